"""Weight and bias gradients: per expert, sums over its rows, a GEMM whose depth is data.

Shapes: p (S, P) sorted by expert; q (S, Q), or gathered (T, Q) through perm; out (E, P, Q) or
transposed (E, Q, P).
"""

import triton
import triton.language as tl

from .gemm import ROWS_BOUND, multiply_add


@triton.jit
def weight_grad_kernel(
    p, q_ptr, out_ptr, perm_ptr, offsets_ptr,
    P: tl.constexpr, Q: tl.constexpr, NUM_EXPERTS, TOP_K: tl.constexpr, GATHER: tl.constexpr,
    stride_p, stride_q, ACCUMULATE: tl.constexpr, TMA_P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows of e of p[row]^T q[row]; (stride_p, stride_q) place it.

    With ACCUMULATE it is added to out in fp32; an expert without rows is neither read nor written.
    p is a descriptor of ragged rows (TMA_P) or a pointer.
    """
    P_TILES: tl.constexpr = (P + BLOCK_M - 1) // BLOCK_M
    Q_TILES: tl.constexpr = (Q + BLOCK_N - 1) // BLOCK_N
    for t in tl.range(
        tl.program_id(0), NUM_EXPERTS * P_TILES * Q_TILES, NUM_PROGRAMS, flatten=FLATTEN
    ):
        e = t // (P_TILES * Q_TILES)
        p0 = (t % P_TILES) * BLOCK_M
        q0 = ((t // P_TILES) % Q_TILES) * BLOCK_N
        lo = tl.load(offsets_ptr + e)
        hi = tl.load(offsets_ptr + e + 1)
        cols_p = p0 + tl.arange(0, BLOCK_M)
        cols_q = q0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(lo, hi, BLOCK_K):
            rows = k0 + tl.arange(0, BLOCK_K)
            exists = rows < hi
            if TMA_P:
                box = p.load([ROWS_BOUND, hi, ROWS_BOUND - hi + k0, p0])
                a = tl.reshape(box, (BLOCK_K, BLOCK_M))
            else:
                at = p + rows.to(tl.int64)[:, None] * P + cols_p[None, :]
                a = tl.load(at, mask=exists[:, None] & (cols_p < P)[None, :], other=0.0)
            if GATHER:
                source = tl.load(perm_ptr + rows, mask=exists, other=0) // TOP_K
            else:
                source = rows
            at = q_ptr + source.to(tl.int64)[:, None] * Q + cols_q[None, :]
            if Q % BLOCK_N == 0:
                b = tl.load(at, mask=exists[:, None], other=0.0)
            else:
                b = tl.load(at, mask=exists[:, None] & (cols_q < Q)[None, :], other=0.0)
            acc = multiply_add(a.T, b, acc, PRECISION)
        at = (
            out_ptr
            + e.to(tl.int64) * P * Q
            + cols_p.to(tl.int64)[:, None] * stride_p
            + cols_q.to(tl.int64)[None, :] * stride_q
        )
        inside = (cols_p < P)[:, None] & (cols_q < Q)[None, :]
        if ACCUMULATE:
            inside &= lo < hi
            acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_grad_kernel(
    rows_ptr, weights_ptr, out_ptr, perm_ptr, offsets_ptr, N, NUM_EXPERTS, TOP_K: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[split, e] = the sum of rows[row] over every SPLITS-th block of e's rows.

    Each row times its routing weight if WEIGHTED.
    """
    e = tl.program_id(0)
    split = tl.program_id(1)
    cols = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    lo = tl.load(offsets_ptr + e)
    hi = tl.load(offsets_ptr + e + 1)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for r0 in range(lo + split * BLOCK_R, hi, SPLITS * BLOCK_R):
        rows = r0 + tl.arange(0, BLOCK_R)
        exists = rows < hi
        slots = tl.load(perm_ptr + rows, mask=exists, other=0)
        source = slots // TOP_K if GATHER else rows
        at = rows_ptr + source.to(tl.int64)[:, None] * N + cols[None, :]
        value = tl.load(at, mask=exists[:, None] & (cols < N)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + slots, mask=exists, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(value, 0)
    at = out_ptr + (split * NUM_EXPERTS + e).to(tl.int64) * N + cols
    tl.store(at, acc, mask=cols < N)
