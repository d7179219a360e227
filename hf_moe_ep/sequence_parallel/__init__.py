"""Sequences longer than one GPU holds: Ulysses for tp_size=1, Megatron-style on the tp axis."""

from .megatron import register
from .plan import sp_plan_for
from .ulysses import enable_sequence_parallel

__all__ = ["enable_sequence_parallel", "register", "share_batches", "sp_plan_for"]


def __getattr__(name: str):
    if name == "share_batches":  # imports Trainer's modules, which `import hf_moe_ep` need not
        from .trainer import share_batches

        return share_batches
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
