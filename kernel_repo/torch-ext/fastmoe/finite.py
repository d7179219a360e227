"""Which of many tensors is the first with a value that is not finite, without waiting for the
device. Bound by the memory's bandwidth: every value is read once.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from .device import backend_name
from .multi_tensor import is_aligned, on_device, places, table

WORDS = 1 << 15  # 32-bit words that a program reads: 128 KiB
# dtype -> exponent bits of the low and the high value in a 32-bit word; all ones: not finite.
EXPONENTS = {
    torch.bfloat16: (0x7F80, 0x7F800000),
    torch.float16: (0x7C00, 0x7C000000),
    torch.float32: (0x7F800000, 0x7F800000),
}


def first_not_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """0-d int32 on their device: the index of the first of `tensors` that holds an infinity or a
    NaN, and len(tensors) where none does.

    tensors: at least one, on one device, of floating dtypes, of any shape, none empty. bf16, fp16
    and fp32 whose memory is dense and comes in multiples of 16 bytes share one launch; the others
    take a norm each.
    """
    launched, others = [], []
    for n, tensor in enumerate(tensors):
        plain = tensor.is_contiguous() and is_aligned(tensor)
        (launched if plain and backend_name(tensor) == "triton" else others).append(n)
    first = torch.full((), len(tensors), dtype=torch.int32, device=tensors[0].device)
    if launched:
        _launch(first, [tensors[n] for n in launched], tuple(launched))
    for numbers in _by_dtype(tensors, others):
        # The largest magnitude is finite exactly if all values are; a 2-norm could overflow.
        norms = torch.stack(torch._foreach_norm([tensors[n] for n in numbers], math.inf))
        order = on_device(tuple(numbers), first.device)
        first = torch.minimum(first, torch.where(norms.isfinite(), len(tensors), order).min())
    return first


def _by_dtype(tensors: list[torch.Tensor], numbers: list[int]) -> list[list[int]]:
    groups = defaultdict(list)
    for n in numbers:
        groups[tensors[n].dtype].append(n)
    return list(groups.values())


def _launch(first: torch.Tensor, tensors: list[torch.Tensor], numbers: tuple[int, ...]) -> None:
    from .backends.triton.finite import first_not_finite_kernel

    words = tuple(t.nbytes // 4 for t in tensors)
    rows = [(t.data_ptr(), w, *EXPONENTS[t.dtype]) for t, w in zip(tensors, words, strict=True)]
    programs = places(words, WORDS, first.device)
    with torch.cuda.device_of(first):
        first_not_finite_kernel[(programs.shape[0],)](
            first, table(rows, first.device), programs, on_device(numbers, first.device),
            WORDS, 4096, num_warps=8,
        )  # fmt: skip
