"""Sequences longer than one GPU holds: Ulysses for tp_size=1, Megatron-style on the tp axis."""

from .megatron import register
from .plan import sp_plan_for
from .trainer import share_batches
from .ulysses import enable_sequence_parallel

__all__ = ["enable_sequence_parallel", "register", "share_batches", "sp_plan_for"]
