"""Every registration with transformers, in one place.

Registers by name through transformers' own registries only.
"""

from __future__ import annotations

from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import fastmoe_experts_forward, unsupported_fp8_experts_forward

EXPERTS_NAME = "fastmoe"


def register() -> None:
    """Make `experts_implementation="fastmoe"` known to transformers. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, fastmoe_experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, unsupported_fp8_experts_forward)
