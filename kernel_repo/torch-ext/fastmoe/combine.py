"""From expert-sorted rows back to tokens: the weighted sum over a token's slots, and its gradients.

Shapes: y (S, H) by row, routing weights (T, K), out and grad (T, H), dots (S, n) by row.
"""

from __future__ import annotations

import torch

from .backends import torch_ops
from .backends.launch import launch, next_power_of_2
from .device import backend_name
from .routing import Routing

_MAX_BLOCK_H = 4096


def combine(
    y: torch.Tensor, weights: torch.Tensor | None, r: Routing, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, H) in the dtype of y: the sum over k of weights[t, k] * y[row of (t, k)].

    Summed in order and in fp32. Without `weights` the plain sum, which is the backward of gathering
    rows. Sentinels add nothing and are not read. Written to `out` if given, contiguous and in the
    dtype of y.
    """
    return _sum_rows(y, weights, r.inv_perm.view(-1, r.top_k), out)


def sum_rows(y: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(T, H) in the dtype of y (R, H): the sum over j of y[positions[t, j]].

    In order and in fp32. A negative position (T, n; int32 or int64) adds nothing.
    """
    return _sum_rows(y, None, positions.contiguous())


def _sum_rows(y, weights, positions: torch.Tensor, out=None) -> torch.Tensor:
    if backend_name(y) == "torch":
        sums = torch_ops.sum_rows(y, weights, positions)
        return sums if out is None else out.copy_(sums)
    from .backends.triton.combine import combine_kernel

    (tokens, top_k), width = positions.shape, y.shape[1]
    out = y.new_empty(tokens, width) if out is None else out
    block = min(_MAX_BLOCK_H, next_power_of_2(width))
    if tokens:
        launch(
            combine_kernel, (tokens, -(-width // block)), (y, weights, positions, out), (),
            (width, top_k, weights is not None, block), num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return out


def combine_backward(
    grad: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, r: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_y (S, H), grad_weights (T, K)); grad_y is zero at rows without an expert."""
    if backend_name(grad) == "torch":
        return torch_ops.combine_backward(grad, y, weights, r)
    from .backends.triton.combine import combine_backward_kernel

    grad_y = torch.empty_like(y)
    dots = y.new_empty(y.shape[0], 1, dtype=torch.float32)
    if y.shape[0]:
        launch(
            combine_backward_kernel, (y.shape[0],),
            (grad, y, weights, r.perm, r.offsets, grad_y, dots), (),
            (y.shape[1], r.num_experts, r.top_k, min(2048, next_power_of_2(y.shape[1]))),
        )  # fmt: skip
    return grad_y, routing_weight_grad(dots, r, weights.dtype)


def routing_weight_grad(dots: torch.Tensor, r: Routing, dtype: torch.dtype) -> torch.Tensor:
    """(T, K): the sum of each slot's row of dots (S, n), exactly zero at sentinels."""
    if backend_name(dots) == "torch":
        return torch_ops.routing_weight_grad(dots, r, dtype)
    from .backends.triton.combine import routing_weight_grad_kernel

    slots, block = r.inv_perm.numel(), 128
    out = dots.new_empty(slots // r.top_k, r.top_k, dtype=dtype)
    if slots:
        launch(
            routing_weight_grad_kernel, (-(-slots // block),), (dots, r.inv_perm, out), (slots,),
            (dots.shape[1], block, next_power_of_2(dots.shape[1])),
        )  # fmt: skip
    return out


def down_bias_dots(
    grad: torch.Tensor, down_bias: torch.Tensor, top_k_index: torch.Tensor
) -> torch.Tensor:
    """(T, K) fp32: <grad[t], down_bias[e]> of every slot, zero at sentinels.

    The bias's part of a routing weight's gradient, as one small GEMM (T, H) x (H, E).
    """
    experts = down_bias.shape[0]
    sentinel = (top_k_index < 0) | (top_k_index >= experts)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dots = grad.to(dtype) @ down_bias.to(dtype).T
    return dots.gather(1, top_k_index.long().masked_fill(sentinel, 0)).masked_fill(sentinel, 0.0)
