"""What each differentiable step saves and which ops its backward calls; launches nothing itself.

Shapes: x (T, H), weights (T, K), up (E, U, H), down (E, H, I) (or transposed), h (S, U), a (S, I),
y (S, H). `Layer` carries the routing and the layout of the weights past autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .combine import combine, down_bias_dots
from .routing import Routing


class Layer(NamedTuple):
    """The parts of one call that are not differentiated."""

    routing: list[Tensor]  # Routing.tensors()
    block_m: int  # rows of a tile, 0 without a tile map. 128
    top_k: int  # K. 8
    transposed: bool  # weights are (E, in, out). False

    @property
    def args(self) -> tuple[list[Tensor], int, int]:
        return self.routing, self.block_m, self.top_k


def fused_forward(
    x, weights, up, down, up_bias, down_bias, layer: Layer, gate: str, keep_h: bool, place=None
):
    """(out (T, H), h (S, U) or empty)."""
    h, a = ops.up_gate(x, up, up_bias, *layer.args, gate, layer.transposed, keep_h)
    y = ops.grouped_linear(a, down, down_bias, *layer.args, layer.transposed, False)
    return _combined(y, weights, layer, place), h


def _combined(y, weights, layer: Layer, place):
    """The sums over slots (T, H), in the memory that `place` gives where there is one."""
    if place is None:
        return ops.combine(y, weights, *layer.args)
    routing = Routing(*layer.routing, layer.block_m, layer.top_k)
    return combine(y, weights, routing, out=place(y.shape[1], y.dtype))


class FusedExperts(torch.autograd.Function):
    """up -> gate -> down -> weighted sum.

    Saves x, h and the routing; never y, never a permuted copy of x. With `recompute` not h either:
    backward begins with the up projection, by the same kernel, and so has the same bits.
    """

    @staticmethod
    def forward(
        ctx, x, weights, up, down, up_bias, down_bias,
        top_k_index, gate, transposed, recompute, accumulating, place, block_m, *routing,
    ):  # fmt: skip
        layer = Layer(list(routing), block_m, top_k_index.shape[1], transposed)
        operands = (x, weights, up, down, up_bias, down_bias)
        out, h = fused_forward(*operands, layer, gate, not recompute, place)
        # Besides the up projection, only the up weight's gradient reads x.
        needed_x = x if recompute or ctx.needs_input_grad[2] else None
        ctx.save_for_backward(
            needed_x, weights, up, down, up_bias, down_bias, top_k_index, h, *routing
        )
        ctx.gate, ctx.transposed, ctx.block_m = gate, transposed, block_m
        ctx.recompute, ctx.accumulating, ctx.place = recompute, accumulating, place
        return out

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivatives(grad)
        x, weights, up, down, up_bias, down_bias, ids, h, *routing = ctx.saved_tensors
        layer = Layer(routing, ctx.block_m, ids.shape[1], ctx.transposed)
        need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = (
            ctx.needs_input_grad[:6]
        )
        gate = ctx.gate
        _release_saved(ctx)
        grad = grad.contiguous()
        d_x = d_weights = d_up = d_down = d_up_bias = d_down_bias = None

        if ctx.recompute:
            h = ops.up_gate(x, up, up_bias, *layer.args, gate, layer.transposed, True)[0]
        grad_h, a, dots = ops.gate_backward(
            grad, weights, down, h, *layer.args, gate, layer.transposed, need_down, need_weights
        )
        del h
        if need_weights:
            if down_bias is not None:
                dots = dots + down_bias_dots(grad, down_bias, ids)
            d_weights = dots.to(weights.dtype)
        if need_down:
            d_down = _weight_grad(a, grad, layer, True, not layer.transposed, ctx.accumulating[1])
        del a
        if need_down_bias:
            d_down_bias = ops.bias_grad(grad, weights, *layer.args, True, down_bias.dtype)
        if need_up_bias:
            d_up_bias = ops.bias_grad(grad_h, None, *layer.args, False, up_bias.dtype)
        if need_x:
            d_rows = ops.grouped_linear(grad_h, up, None, *layer.args, not layer.transposed, False)
            d_x = _combined(d_rows, None, layer, ctx.place)
            del d_rows
        if need_up:
            d_up = _weight_grad(grad_h, x, layer, True, layer.transposed, ctx.accumulating[0])
        return d_x, d_weights, d_up, d_down, d_up_bias, d_down_bias, *[None] * (7 + len(routing))


class GroupedLinear(torch.autograd.Function):
    """One projection of every row, for experts whose gate or norm runs as the model wrote it.

    Rows without an expert come out as zeros, forward and backward, because code that is not ours
    reads them.
    """

    @staticmethod
    def forward(ctx, rows, w, bias, gather, accumulating, top_k, transposed, block_m, *routing):
        layer = Layer(list(routing), block_m, top_k, transposed)
        needed_rows = rows if ctx.needs_input_grad[1] else None  # for the weight's gradient
        ctx.save_for_backward(needed_rows, w, bias, *routing)
        ctx.gather, ctx.layer_numbers = gather, (block_m, top_k, transposed)
        ctx.accumulating = accumulating
        return _zero_tail(
            ops.grouped_linear(rows, w, bias, *layer.args, transposed, gather), routing
        )

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivatives(grad)
        rows, w, bias, *routing = ctx.saved_tensors
        layer, gather = Layer(routing, *ctx.layer_numbers), ctx.gather
        need_rows, need_w, need_bias = ctx.needs_input_grad[:3]
        grad = _zero_tail(grad.contiguous(), routing)
        d_rows = d_w = d_bias = None
        if need_w:
            d_w = _weight_grad(grad, rows, layer, gather, layer.transposed, ctx.accumulating)
        if need_bias:
            d_bias = ops.bias_grad(grad, None, *layer.args, False, bias.dtype)
        if need_rows:
            d_rows = ops.grouped_linear(grad, w, None, *layer.args, not layer.transposed, False)
            d_rows = (
                ops.combine(d_rows, None, *layer.args) if gather else _zero_tail(d_rows, routing)
            )
        return d_rows, d_w, d_bias, *[None] * (5 + len(routing))


class Combine(torch.autograd.Function):
    """The weighted sum over a token's slots, saving y.

    For experts with a norm after the down projection.
    """

    @staticmethod
    def forward(ctx, y, weights, block_m, *routing):
        ctx.save_for_backward(y, weights, *routing)
        ctx.block_m = block_m
        return ops.combine(y, weights, list(routing), block_m, weights.shape[1])

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivatives(grad)
        y, weights, *routing = ctx.saved_tensors
        d_y, d_weights = ops.combine_backward(
            grad.contiguous(), y, weights, routing, ctx.block_m, weights.shape[1]
        )
        return d_y, d_weights, None, *[None] * len(routing)


def _weight_grad(p, q, layer: Layer, gather: bool, transpose_out: bool, accumulating):
    """The gradient of a weight; None once it is in the `main_grad` of the parameter given."""
    if accumulating is None:
        return ops.weight_grad(p, q, *layer.args, gather, transpose_out)
    ops.add_weight_grad(p, q, accumulating.main_grad, *layer.args, gather, transpose_out)
    accumulating.grad_added_to_main_grad = True
    return None


def _zero_tail(rows: Tensor, routing) -> Tensor:
    """rows (S, N) with zeros at and past offsets[-1]."""
    offsets = routing[2]
    tail = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill(tail.unsqueeze(1), 0.0)


def _release_saved(ctx) -> None:
    """Let go of the saved tensors as the backward uses them up.

    Unless the graph is retained: torch knows which.
    """
    if not torch.compiler.is_compiling():
        ctx.maybe_clear_saved_tensors()


def _refuse_second_derivatives(grad: Tensor) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ValueError(
            "fastmoe has no second derivatives (create_graph=True); "
            'use model.set_experts_implementation("eager") where they are needed'
        )
