"""The host wrappers as registered custom ops.

So tracers see one opaque node each, with its output shapes.

Shapes as in `grouped_gemm` and `combine`; `routing` is Routing.tensors() and `block_m`, `top_k` its
two numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import combine as _combine
from . import decode as _decode
from . import grouped_gemm as _gemm
from ._ops import add_op_namespace_prefix
from .gates import Gate
from .routing import Routing, max_tiles
from .routing import route as _route

_THREADS = 16  # a step has about ten ops


class _PutOff(threading.local):
    calls: list | None = None  # of this thread, while `side_by_side` collects them


_put_off = _PutOff()


def side_by_side(step: Callable[[], None], like: Tensor) -> None:
    """Run `step` with every op put off, its results left unwritten; then all ops, a thread each.

    On the device of `like`. For what the first call of an op does besides: it compiles. Exceptions
    of the ops are dropped, and so is what memory has no room for. No caller's autocast, hooks or
    checkpointing reaches these threads.
    """
    calls = []

    def collect() -> None:
        _put_off.calls = calls
        try:
            with torch.cuda.device_of(like):
                step()
        except torch.OutOfMemoryError:
            pass  # those left compile at their first launch
        finally:
            _put_off.calls = None

    def run(function: Callable, args: tuple) -> None:
        with torch.cuda.device_of(like), torch.no_grad():
            function(*args)

    with ThreadPoolExecutor(_THREADS) as threads:
        threads.submit(collect).result()
        for call in calls:
            threads.submit(run, *call)


def _op(schema: str, fake: Callable) -> Callable:
    """Register the decorated function as a custom op on every device, for those who trace.

    `fake` gives its output shapes. Nobody tracing, the function is called as it is: the dispatcher
    costs some 30 us a call, which a step of few tokens would wait for.
    """

    def register(function: Callable) -> Callable:
        name = add_op_namespace_prefix(function.__name__)
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, fake)
        namespace, _, op = name.partition("::")
        registered = getattr(getattr(torch.ops, namespace), op)

        @wraps(function)
        def call(*args):
            if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
                return registered(*args)
            if _put_off.calls is not None:
                _put_off.calls.append((function, args))
                return fake(*args)
            return function(*args)

        call.registered = registered
        return call

    return register


def _fake_route(ids, num_experts, block_m):
    slots = ids.numel()
    tiles = max_tiles(slots, num_experts, block_m) if block_m else 0
    shapes = ((slots,), (slots,), (num_experts + 1,), (tiles, 2), (1,))
    return tuple(ids.new_empty(shape, dtype=torch.int32) for shape in shapes)


@_op(
    "(Tensor ids, int num_experts, int block_m) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_route,
)
def route(ids, num_experts, block_m):
    return tuple(_route(ids, num_experts, block_m).tensors())


def _widths(w: Tensor, transposed: bool) -> int:
    return w.shape[2] if transposed else w.shape[1]


def _fake_up_gate(x, up, bias, routing, block_m, top_k, gate, transposed, keep_h):
    rows, width = routing[0].shape[0], _widths(up, transposed)
    h = x.new_empty((rows, width) if keep_h else (0,))
    return h, x.new_empty(rows, width // 2 if Gate.from_spec(gate).gated else width)


@_op(
    "(Tensor x, Tensor up, Tensor? bias, Tensor[] routing, int block_m,"
    " int top_k, str gate, bool transposed, bool keep_h) -> (Tensor, Tensor)",
    _fake_up_gate,
)
def up_gate(x, up, bias, routing, block_m, top_k, gate, transposed, keep_h):
    r = Routing(*routing, block_m, top_k)
    return _gemm.up_gate(x, up, bias, r, Gate.from_spec(gate), transposed, keep_h)


def _fake_grouped_linear(rows, w, bias, routing, block_m, top_k, transposed, gather):
    return rows.new_empty(routing[0].shape[0], _widths(w, transposed))


@_op(
    "(Tensor rows, Tensor w, Tensor? bias, Tensor[] routing, int block_m, int top_k,"
    " bool transposed, bool gather) -> Tensor",
    _fake_grouped_linear,
)
def grouped_linear(rows, w, bias, routing, block_m, top_k, transposed, gather):
    return _gemm.grouped_linear(
        rows, w, bias, Routing(*routing, block_m, top_k), transposed, gather
    )


def _fake_gate_backward(
    grad, weights, down, h, routing, block_m, top_k, gate, transposed, keep_a, keep_dots
):
    inner = down.shape[1] if transposed else down.shape[2]
    a = grad.new_empty((h.shape[0], inner) if keep_a else (0,))
    dots = weights.new_empty(weights.shape if keep_dots else (0,), dtype=torch.float32)
    return torch.empty_like(h), a, dots


@_op(
    "(Tensor grad, Tensor weights, Tensor down, Tensor h, Tensor[] routing,"
    " int block_m, int top_k, str gate, bool transposed, bool keep_a, bool keep_dots)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_gate_backward,
)
def gate_backward(
    grad, weights, down, h, routing, block_m, top_k, gate, transposed, keep_a, keep_dots
):
    r = Routing(*routing, block_m, top_k)
    grad_h, a, dots = _gemm.gate_backward(
        grad, weights, down, h, r, Gate.from_spec(gate), transposed, keep_a
    )
    if not keep_dots:
        return grad_h, a, weights.new_empty(0, dtype=torch.float32)
    return grad_h, a, _combine.routing_weight_grad(dots, r, torch.float32)


def _fake_weight_grad(p, q, routing, block_m, top_k, gather, transpose_out):
    shape = (q.shape[1], p.shape[1]) if transpose_out else (p.shape[1], q.shape[1])
    return p.new_empty(routing[2].shape[0] - 1, *shape)


@_op(
    "(Tensor p, Tensor q, Tensor[] routing, int block_m, int top_k, bool gather,"
    " bool transpose_out) -> Tensor",
    _fake_weight_grad,
)
def weight_grad(p, q, routing, block_m, top_k, gather, transpose_out):
    return _gemm.weight_grad(p, q, Routing(*routing, block_m, top_k), gather, transpose_out)


def _fake_add_weight_grad(p, q, out, routing, block_m, top_k, gather, transpose_out):
    return None


@_op(
    "(Tensor p, Tensor q, Tensor(a!) out, Tensor[] routing, int block_m, int top_k, bool gather,"
    " bool transpose_out) -> ()",
    _fake_add_weight_grad,
)
def add_weight_grad(p, q, out, routing, block_m, top_k, gather, transpose_out):
    _gemm.add_weight_grad(p, q, out, Routing(*routing, block_m, top_k), gather, transpose_out)


def _fake_bias_grad(rows, weights, routing, block_m, top_k, gather, dtype):
    return rows.new_empty(routing[2].shape[0] - 1, rows.shape[1], dtype=dtype)


@_op(
    "(Tensor rows, Tensor? weights, Tensor[] routing, int block_m, int top_k, bool gather,"
    " ScalarType dtype) -> Tensor",
    _fake_bias_grad,
)
def bias_grad(rows, weights, routing, block_m, top_k, gather, dtype):
    return _gemm.bias_grad(rows, weights, Routing(*routing, block_m, top_k), gather, dtype)


def _fake_combine(y, weights, routing, block_m, top_k):
    return y.new_empty(routing[1].shape[0] // top_k, y.shape[1])


@_op(
    "(Tensor y, Tensor? weights, Tensor[] routing, int block_m, int top_k) -> Tensor", _fake_combine
)
def combine(y, weights, routing, block_m, top_k):
    return _combine.combine(y, weights, Routing(*routing, block_m, top_k))


def _fake_combine_backward(grad, y, weights, routing, block_m, top_k):
    return torch.empty_like(y), torch.empty_like(weights)


@_op(
    "(Tensor grad, Tensor y, Tensor weights, Tensor[] routing, int block_m, int top_k)"
    " -> (Tensor, Tensor)",
    _fake_combine_backward,
)
def combine_backward(grad, y, weights, routing, block_m, top_k):
    return _combine.combine_backward(grad, y, weights, Routing(*routing, block_m, top_k))


def _fake_decode(x, ids, weights, up, down, up_bias, down_bias, gate, transposed):
    return torch.empty_like(x)


@_op(
    "(Tensor x, Tensor ids, Tensor weights, Tensor up, Tensor down, Tensor? up_bias,"
    " Tensor? down_bias, str gate, bool transposed) -> Tensor",
    _fake_decode,
)
def decode(x, ids, weights, up, down, up_bias, down_bias, gate, transposed):
    gate = Gate.from_spec(gate)
    return _decode.decode(x, ids, weights, up, down, up_bias, down_bias, gate, transposed)
