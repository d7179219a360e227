"""From expert-sorted rows back to tokens, and that sum's gradients. Memory-bound; one pass each.

Shapes: y (S, H) by row, weights and inv_perm (S,) by slot = t*K + k, out and grad (T, H), dots
(S, n) by row.
"""

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    y_ptr, weights_ptr, inv_perm_ptr, out_ptr,
    H, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order and in fp32, of weight * y[row of slot (t, k)].

    Sentinels are skipped.
    """
    t = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = t.to(tl.int64) * TOP_K + k
        row = tl.load(inv_perm_ptr + slot)
        part = tl.load(
            y_ptr + row.to(tl.int64) * H + cols, mask=(cols < H) & (row >= 0), other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights_ptr + slot).to(tl.float32)
        acc += part
    tl.store(out_ptr + t.to(tl.int64) * H + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < H)


@triton.jit
def combine_backward_kernel(
    grad_ptr, y_ptr, weights_ptr, perm_ptr, offsets_ptr, grad_y_ptr, dots_ptr,
    H, NUM_EXPERTS, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grad_y[row] = weight * grad[token] and dots[row] = <grad[token], y[row]>.

    grad_y is zero at rows without an expert.
    """
    row = tl.program_id(0)
    exists = row < tl.load(offsets_ptr + NUM_EXPERTS)
    slot = tl.load(perm_ptr + row, mask=exists, other=0)
    weight = tl.load(weights_ptr + slot, mask=exists, other=0.0).to(tl.float32)
    token = (slot // TOP_K).to(tl.int64)
    dot = tl.zeros((BLOCK_H,), tl.float32)
    for h0 in range(0, H, BLOCK_H):
        cols = h0 + tl.arange(0, BLOCK_H)
        inside = cols < H
        g = tl.load(grad_ptr + token * H + cols, mask=inside & exists, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row.to(tl.int64) * H + cols, mask=inside & exists, other=0.0).to(
            tl.float32
        )
        dot += g * y
        tl.store(
            grad_y_ptr + row.to(tl.int64) * H + cols,
            (g * weight).to(grad_y_ptr.dtype.element_ty),
            mask=inside,
        )
    tl.store(dots_ptr + row, tl.sum(dot, 0))


@triton.jit(do_not_specialize=["S"])
def routing_weight_grad_kernel(
    dots_ptr, inv_perm_ptr, out_ptr, S, n, BLOCK_S: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """out[slot] = the sum of the n columns of dots at the slot's row, zero for a sentinel."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = tl.load(inv_perm_ptr + slots, mask=slots < S, other=-1)
    cols = tl.arange(0, BLOCK_COLS)
    at = dots_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    value = tl.load(at, mask=(rows >= 0)[:, None] & (cols < n)[None, :], other=0.0)
    tl.store(out_ptr + slots, tl.sum(value, 1).to(out_ptr.dtype.element_ty), mask=slots < S)
