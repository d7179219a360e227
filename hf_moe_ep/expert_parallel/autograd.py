"""The two steps of an exchange as autograd sees them: each one's backward is the other.

Shapes: x (T, H), ids and weights (T, K), rows (R, H) as in `exchange`.
"""

from __future__ import annotations

import torch


class Dispatch(torch.autograd.Function):
    """x and routing weights to the experts; their gradients come back summed over the ranks."""

    @staticmethod
    def forward(ctx, x, weights, ids, exchange, lengths):
        received = exchange.dispatch(x, ids, weights, lengths)
        ctx.layout = received.layout
        ctx.mark_non_differentiable(received.ids)
        if not ctx.needs_input_grad[0]:  # agreed by all ranks: else one would wait for the others
            ctx.mark_non_differentiable(received.rows)
        return received.rows, received.ids, received.weights, received.layout, received.num_rows

    @staticmethod
    def backward(ctx, d_rows, _d_ids, d_weights, *_):
        need_x, need_weights = ctx.needs_input_grad[:2]
        d_x = ctx.layout.collect(d_rows) if need_x else None
        return d_x, ctx.layout.collect(d_weights) if need_weights else None, None, None, None


class Combine(torch.autograd.Function):
    """Partial sums (R, H) back to the tokens (T, H); a gradient goes wherever its token went."""

    @staticmethod
    def forward(ctx, rows, layout):
        ctx.layout = layout
        return layout.collect(rows)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout.send(grad.contiguous()), None
