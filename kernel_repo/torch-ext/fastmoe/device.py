"""Which backend serves a tensor, and the few facts about its device that launches need."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


_HAS_TRITON = find_spec("triton") is not None
# Whether Triton runs its kernels in Python, which also serves CPU tensors. Triton reads this when
# it is imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and _HAS_TRITON


@torch.compiler.assume_constant_result
@lru_cache
def _gpu_served(index: int) -> bool:
    if not _HAS_TRITON:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def backend_name(tensor: torch.Tensor) -> str:
    """ "triton" or "torch".

    "triton" on CUDA GPUs of compute capability 8.0 and newer, on ROCm (unmeasured) and under
    Triton's interpreter, for bf16, fp16 and fp32; "torch" everywhere else.
    """
    if tensor.dtype not in _KERNEL_DTYPES:
        return "torch"
    if tensor.device.type == "cuda":
        return "triton" if _gpu_served(tensor.device.index or 0) else "torch"
    return "triton" if tensor.device.type == "cpu" and INTERPRETING else "torch"


@lru_cache
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: one for each multiprocessor; four under the interpreter."""
    return (
        4
        if device.type == "cpu"
        else torch.cuda.get_device_properties(device).multi_processor_count
    )


@lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether tensor descriptors become bulk copies (Hopper and newer).

    The interpreter runs that path too.
    """
    if device.type == "cpu":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended, if it waits for that itself.

    That is programmatic dependent launch, on Hopper and newer; it hides the time between two.
    """
    return device.type == "cuda" and has_tma(device)


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's name, "tf32" or "ieee", for how operands of this dtype are multiplied.

    fp32 as torch's own matmul is set to do it.
    """
    if dtype != torch.float32:
        return "ieee"
    # From torch 2.9 on; there the older function raises once this was set.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    precision = precision or torch.get_float32_matmul_precision()
    return "tf32" if precision in ("tf32", "high", "medium") else "ieee"
