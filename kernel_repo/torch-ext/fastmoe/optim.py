"""What an optimizer's step does to many tensors, at the memory's bandwidth: the sum of squares that
clipping needs, scaling, and AdamW.

A Mixture-of-Experts model has ten times more weights than it uses for a token, so these passes take
a sixth of a step with torch's functions, at 62% (AdamW) and 19% (clipping) of an H200's bandwidth
over 5.6e9 bf16 weights. One launch for all tensors of a device and dtype, and one for those whose
addresses are not multiples of 16 bytes; a tensor that is not contiguous, or not on such a GPU, goes
to torch's own functions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .device import backend_name
from .multi_tensor import is_aligned, places, table

PART = 1 << 15  # values of a tensor that a program works on
BLOCK = 4096  # of them at once


def square_sum(tensors: list[Tensor]) -> Tensor:
    """0-d fp32 on their device: the sum of the squares of all values, in fp32.

    tensors: at least one, on one device, of floating dtypes and any shape, none empty. The same
    values give the same bits.
    """
    from .backends.triton.optim import square_sum_kernel

    served, others = _split([(t,) for t in tensors])
    sums = []
    for aligned, numbers in served:
        rows, programs = _work([tensors], numbers)
        example = tensors[numbers[0]]
        partial = example.new_empty(programs.shape[0], dtype=torch.float32)
        with torch.cuda.device_of(partial):
            square_sum_kernel[(programs.shape[0],)](
                partial, rows, programs, _triton_dtype(example), aligned, PART, BLOCK, num_warps=8
            )
        sums.append(partial.sum())
    for dtype in dict.fromkeys(tensors[n].dtype for n in others):
        group = [tensors[n] for n in others if tensors[n].dtype == dtype]
        norms = torch._foreach_norm(group, 2, dtype=torch.promote_types(dtype, torch.float32))
        sums.append(torch.stack(norms).square().sum().float())
    return torch.stack(sums).sum()


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiplies all values by `factor`, 0-d fp32 on their device; the kernels read nothing where
    it is 1.

    tensors: as in `square_sum`.
    """
    from .backends.triton.optim import scale_kernel

    served, others = _split([(t,) for t in tensors])
    for aligned, numbers in served:
        rows, programs = _work([tensors], numbers)
        dtype = _triton_dtype(tensors[numbers[0]])
        with torch.cuda.device_of(factor):
            scale_kernel[(programs.shape[0],)](
                factor, rows, programs, dtype, aligned, PART, BLOCK, num_warps=8
            )
    for n in others:  # in fp32, too: torch would round the factor to 16 bits first
        wide = torch.promote_types(tensors[n].dtype, torch.float32)
        tensors[n].copy_(tensors[n].to(wide) * factor)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW (arXiv 1711.05101), in place: the formula of `torch.optim.AdamW(fused)`.

    The five lists go together: a parameter, its gradient and two moments have one shape, device and
    float dtype (on GPUs, where contiguous, each its own); steps are 0-d fp32 there and count the
    steps before this one. Computed in fp32 from 1 - beta in fp64 (torch subtracts in fp32 on a GPU,
    1.3e-5 off for 0.999); each result is rounded once to its tensor's dtype.
    """
    from .backends.triton.optim import adamw_kernel

    lists = (params, grads, exp_avgs, exp_avg_sqs)
    served, others = _split(zip(*lists, strict=True))
    if served:
        torch._foreach_add_([steps[n] for _, numbers in served for n in numbers], 1)
    for aligned, numbers in served:
        rows, programs = _work([*lists, steps], numbers)
        dtypes = [_triton_dtype(part[numbers[0]]) for part in lists]
        with torch.cuda.device_of(params[numbers[0]]):
            adamw_kernel[(programs.shape[0],)](
                rows, programs, float(lr), float(lr * weight_decay), float(eps),
                *(1.0 - beta for beta in betas),
                *(math.log(beta) if beta else -math.inf for beta in betas),
                *dtypes, aligned, PART, BLOCK, num_warps=8,
            )  # fmt: skip
    if others:
        picked = ([part[n] for n in others] for part in lists)
        adamw(
            *picked, [], [steps[n] for n in others], fused=True, amsgrad=False, maximize=False,
            beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
        )  # fmt: skip


def _split(items: Iterable[tuple[Tensor, ...]]) -> tuple[list[tuple[bool, list[int]]], list[int]]:
    """Positions of the items that the kernels take, and of the others.

    Of the first, lists of one device, dtypes and alignment, beside that alignment.
    """
    served, others = defaultdict(list), []
    kinds: dict[tuple, bool] = {}  # asked once each: a model has hundreds of tensors of few kinds
    for n, tensors in enumerate(items):
        kind = (tensors[0].device, *[t.dtype for t in tensors])
        if kind not in kinds:
            kinds[kind] = all(backend_name(t) == "triton" for t in tensors)
        if kinds[kind] and tensors[0].numel() and all(map(Tensor.is_contiguous, tensors)):
            served[all(map(is_aligned, tensors)), *kind].append(n)
        else:
            others.append(n)
    return [(key[0], numbers) for key, numbers in served.items()], others


def _work(lists: list[list[Tensor]], numbers: list[int]) -> tuple[Tensor, Tensor]:
    """What the kernels call table and places, of these positions: a row has the address of the
    tensor in each list, and the size of the first.
    """
    sizes = tuple(lists[0][n].numel() for n in numbers)
    addresses = zip(*([part[n].data_ptr() for n in numbers] for part in lists), strict=True)
    rows = [(*found, size) for found, size in zip(addresses, sizes, strict=True)]
    device = lists[0][numbers[0]].device
    return table(rows, device), places(sizes, PART, device)


def _triton_dtype(tensor: Tensor):
    import triton.language as tl

    return getattr(tl, str(tensor.dtype).removeprefix("torch."))
