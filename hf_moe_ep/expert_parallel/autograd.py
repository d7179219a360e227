"""The two steps of an exchange as autograd sees them: each one's backward is the other.

Shapes: x (T, H), ids and weights (T, K), rows (R, H) as in `exchange`.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from ..kernel import get_kernel

fastmoe = get_kernel()

FEW_SLOTS = 8192  # up to here buffers for the worst case are small, and nobody waits for a count


class Dispatch(torch.autograd.Function):
    """x and routing weights to the experts; their gradients come back summed over the ranks.

    Gives rows, ids, weights, layout and, with `route`, the routing of the rows for fastmoe. `where`
    goes into the notes of an error in backward.
    """

    @staticmethod
    def forward(ctx, x, weights, ids, exchange, lengths, route, where):
        plan = exchange.plan(ids, weights, lengths, x)
        routing = None
        if route:
            routing = Routed(
                fastmoe.route_experts(x, plan.ids, exchange.experts, share=len(lengths)),
                plan.slots,
            )
        rows = plan.layout.send(x)  # meanwhile the number of rows arrives
        ctx.layout, ctx.where = plan.layout, where
        ctx.mark_non_differentiable(plan.ids)
        if not ctx.needs_input_grad[0]:  # agreed by all ranks: else one would wait for the others
            ctx.mark_non_differentiable(rows)
        return rows, plan.ids, plan.weights, plan.layout, routing

    @staticmethod
    def backward(ctx, d_rows, _d_ids, d_weights, *_):
        need_x, need_weights = ctx.needs_input_grad[:2]
        with noted(f"in backward of {ctx.where}"):
            sums = ctx.layout.collect(*[d_rows] * need_x, *[d_weights] * need_weights)
        d_x = sums.pop(0) if need_x else None
        return d_x, sums.pop() if need_weights else None, None, None, None, None, None


class Combine(torch.autograd.Function):
    """Partial sums (R, H) back to the tokens (T, H); a gradient goes wherever its token went."""

    @staticmethod
    def forward(ctx, rows, layout, where):
        ctx.layout, ctx.where = layout, where
        return layout.collect(rows)[0]

    @staticmethod
    def backward(ctx, grad):
        with noted(f"in backward of {ctx.where}"):
            return ctx.layout.send(grad.contiguous()), None, None


@contextmanager
def noted(where: str):
    """An exception that passes gets `where` as a note, which its traceback ends with."""
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise


class Routed:
    """A routing whose number of rows, offsets[-1], is on its way to the host.

    The experts' buffers are fitted to it, where the worst case is as many times larger as there are
    ranks. `rows` is that number where the host knows it. Nobody waits for it for few slots, with
    HF_MOE_EP_WAIT=0, nor while a CUDA graph is captured, where nothing can wait.
    """

    def __init__(self, routing, rows: int | None = None):
        self.routing = routing if rows is None else routing.cut(rows)
        self.number = None
        on_gpu = routing.offsets.is_cuda
        patient = rows is None and os.environ.get("HF_MOE_EP_WAIT") != "0"
        if (
            patient
            and routing.perm.numel() > FEW_SLOTS
            and not (on_gpu and torch.cuda.is_current_stream_capturing())
        ):
            self.number = torch.empty(1, dtype=torch.int32, pin_memory=on_gpu)
            self.number.copy_(routing.offsets[-1:], non_blocking=True)
            self.arrived = torch.cuda.current_stream().record_event() if on_gpu else None

    def __call__(self):
        """The routing with rows for what is in use only; waits for their number."""
        if self.number is None:
            return self.routing
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.routing.cut(int(self.number))
