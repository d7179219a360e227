"""Every registration with transformers, in one place.

Registers by name through transformers' own registries only.
"""

from __future__ import annotations

import torch.distributed
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import experts


def register() -> None:
    """Make `experts_implementation="fastmoe"` and "fastmoe_lean" known to transformers, and our
    styles. Idempotent.
    """
    forwards = experts.fastmoe_experts_forward, experts.lean_experts_forward
    for name, forward in zip(experts.NAMES, forwards, strict=True):
        ALL_EXPERTS_FUNCTIONS.register(name, forward)
        ALL_FP8_EXPERTS_FUNCTIONS.register(name, experts.unsupported_fp8_experts_forward)
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
