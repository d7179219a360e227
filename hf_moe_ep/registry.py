"""Every registration with transformers, in one place.

Registers by name through transformers' own registries only.
"""

from __future__ import annotations

import torch.distributed
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import fastmoe_experts_forward, unsupported_fp8_experts_forward

EXPERTS_NAME = "fastmoe"


def register() -> None:
    """Make `experts_implementation="fastmoe"` known to transformers, and our styles. Idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, fastmoe_experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, unsupported_fp8_experts_forward)
    if torch.distributed.is_available():
        _register_distributed()


def _register_distributed() -> None:
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from . import sequence_parallel
    from .expert_parallel import AutoEP, FastMoEEP
    from .styles import AccumulationSafeGradAllReduce

    style = AccumulationSafeGradAllReduce()
    ALL_PARALLEL_STYLES.register("replicated_with_grad_allreduce", style)
    EPImplementationInterface.register("fastmoe", FastMoEEP)
    EPImplementationInterface.register("auto", AutoEP)
    sequence_parallel.register()
