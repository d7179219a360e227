"""The whole operator in plain PyTorch on `grouped_mm`.

The CPU path, and the fallback where Triton does not serve.

Shapes: x (T, H), rows (S, ·) sorted by expert, weights w (E, N, K) or (E, K, N), r the Routing of
the layer. Rows at or past offsets[-1] hold nothing: they are computed from rows that exist, or not
at all, and never read.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

# Public since torch 2.10; the private name has a CPU kernel since 2.9.
_torch_grouped_mm = getattr(F, "grouped_mm", None)
if _torch_grouped_mm is None and torch.__version__ >= (2, 9):
    _torch_grouped_mm = torch._grouped_mm
_ALIGNMENT = 16  # bytes; what torch's grouped_mm asks of the strides and pointers of its operands


def route_slots(ids: torch.Tensor, num_experts: int):
    """perm, inv_perm, offsets, and an empty tile map, from the ids (S,) of the slots."""
    sentinel = (ids < 0) | (ids >= num_experts)
    experts, perm = torch.sort(ids.masked_fill(sentinel, num_experts), stable=True)
    bounds = torch.arange(num_experts + 1, device=ids.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, bounds, out_int32=True)
    rows = torch.arange(ids.numel(), device=ids.device, dtype=torch.int32)
    inv_perm = torch.empty_like(rows).scatter_(0, perm, rows).masked_fill(sentinel, -1)
    no_tiles = offsets.new_zeros(0, 2)
    return perm.int(), inv_perm, offsets, no_tiles, offsets.new_zeros(1)


def up_gate(x, up, up_bias, r, gate, transposed, keep_h):
    """(h, a): the up projection of every row's token, empty unless `keep_h`, and its activation."""
    h = grouped_linear(x, up, up_bias, r, transposed, gather=True)
    a = gate(h)
    return (h if keep_h else h.new_empty(0)), a


def grouped_linear(rows, w, bias, r, transposed, gather):
    """(S, N): every row times its expert's weight.

    `gather` takes the row's token from rows (T, K) first.
    """
    if gather:
        rows = rows[_tokens(r)]
    out = _grouped_mm(rows, w if transposed else w.transpose(1, 2), r)
    return out if bias is None else out + bias[_row_experts(r)]


def gate_backward(grad, weights, down, h, r, gate, transposed, keep_a):
    """(grad_h, weighted a, <grad of y, y> as (S, 1) less its bias part).

    See `grouped_gemm.gate_backward`.
    """
    grad_a = grouped_linear(grad, down, None, r, not transposed, gather=True)
    a = gate(h)
    w = weights.reshape(-1)[r.perm.long()].unsqueeze(1)
    wide = torch.promote_types(h.dtype, torch.float32)
    dot = (grad_a.to(wide) * a).sum(-1, keepdim=True)
    grad_h = gate.backward(h, grad_a * w)
    return grad_h, ((a * w).to(a.dtype) if keep_a else a.new_empty(0)), dot


def weight_grad(p, q, r, gather, transpose_out):
    """(E, P, Q), or (E, Q, P) transposed.

    Per expert, the sum over its rows of the outer products of p (S, P) and q.
    """
    if gather:
        q = q[_tokens(r)]
    return _outer_products(q, p, r) if transpose_out else _outer_products(p, q, r)


def bias_grad(rows, weights, r, gather, dtype):
    """(E, N): per expert, the sum of its rows, each times its routing weight if given."""
    if gather:
        rows = rows[_tokens(r)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if weights is not None:
        rows = rows * weights.reshape(-1)[r.perm.long()].unsqueeze(1)
    out = rows.new_zeros(r.num_experts + 1, rows.shape[1])
    return out.index_add_(0, _row_experts(r, past_end=r.num_experts), rows)[:-1].to(dtype)


def sum_rows(y, weights, positions):
    """(T, H): the sum over j of y[positions[t, j]], weighted where weights (T, n) are given.

    In order, and in fp32 at least; a negative position adds nothing.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(positions.shape[0], y.shape[1], dtype=dtype)
    if not y.shape[0]:
        return out.to(y.dtype)
    for k, row in enumerate(positions.unbind(1)):
        part = y[row.clamp(min=0)].to(out.dtype)
        if weights is not None:
            part = part * weights[:, k, None]
        out += part.masked_fill((row < 0).unsqueeze(1), 0.0)
    return out.to(y.dtype)


def combine_backward(grad, y, weights, r):
    """(grad_y (S, H) with zeros at rows without an expert, grad of weights (T, K))."""
    tail = torch.arange(r.perm.numel(), device=grad.device) >= r.offsets[-1]
    g = grad[_tokens(r)]
    w = weights.reshape(-1)[r.perm.long()].unsqueeze(1)
    grad_y = (g * w).masked_fill(tail.unsqueeze(1), 0.0).to(y.dtype)
    dot = (g.to(torch.promote_types(g.dtype, torch.float32)) * y).sum(-1, keepdim=True)
    return grad_y, routing_weight_grad(dot, r, weights.dtype)


def routing_weight_grad(dots, r, dtype):
    """(T, K): the sum over the columns of dots (S, n) at each slot's row, zero at sentinels."""
    rows = r.inv_perm.view(-1, r.top_k)
    if not dots.shape[0]:
        return dots.new_zeros(rows.shape, dtype=dtype)
    return dots.sum(-1)[rows.clamp(min=0).long()].masked_fill(rows < 0, 0.0).to(dtype)


def _tokens(r) -> torch.Tensor:
    return r.perm.long() // r.top_k


def _row_experts(r, past_end: int | None = None) -> torch.Tensor:
    """The expert of each row; rows without one get the last expert, or `past_end`."""
    rows = torch.arange(r.perm.numel(), device=r.offsets.device, dtype=torch.int32)
    experts = torch.searchsorted(r.offsets[1:], rows, right=True)
    return experts.clamp(max=r.num_experts - 1 if past_end is None else past_end)


def _grouped_mm(rows: torch.Tensor, w: torch.Tensor, r) -> torch.Tensor:
    """(S, N) from rows (S, K) and w (E, K, N)."""
    if _serves_grouped_mm(rows, w):
        return _torch_grouped_mm(rows, w, offs=r.offsets[1:])
    out = rows.new_zeros(rows.shape[0], w.shape[2])
    for e, lo, hi in _segments(r):
        out[lo:hi] = _mm(rows[lo:hi], w[e])
    return out


def _outer_products(a: torch.Tensor, b: torch.Tensor, r) -> torch.Tensor:
    """(E, A, B) from rows a (S, A) and b (S, B)."""
    if _serves_grouped_mm(a, b):
        return _torch_grouped_mm(a.t(), b, offs=r.offsets[1:])
    out = a.new_zeros(r.num_experts, a.shape[1], b.shape[1])
    for e, lo, hi in _segments(r):
        out[e] = _mm(a[lo:hi].t(), b[lo:hi])
    return out


def _serves_grouped_mm(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether torch's grouped_mm takes these operands.

    16-bit or fp32, strides that are multiples of 16 bytes.
    """
    if _torch_grouped_mm is None or a.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        return False
    return all(_aligned(t) for t in (a, b))


def _aligned(t: torch.Tensor) -> bool:
    """Unit stride along one of the last two dimensions, 16-byte multiples elsewhere.

    The address, too, is a multiple of 16 bytes.
    """
    *batch, rows, columns = (s * t.element_size() for s in t.stride())
    others = (*batch, max(rows, columns), t.data_ptr())
    return min(rows, columns) == t.element_size() and all(s % _ALIGNMENT == 0 for s in others)


def _segments(r):
    """(expert, first row, past-the-last row) of every expert in use; read on the host."""
    bounds = r.offsets.tolist()
    return [(e, lo, hi) for e, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
