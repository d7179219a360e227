"""Experts for a handful of tokens, bound by reading weights: no sort, no tensor cores.

Shapes: x (T, H), ids and weights (S,) by slot = t*K + k, up (E, U, H) or transposed (E, H, U), down
(E, H, I) or (E, I, H), a (S, I), out (T, H). Each slot reads its expert's weights once.
"""

import triton
import triton.language as tl

from .gated import activation, gate_forward


@triton.jit
def _after_previous(EARLY: tl.constexpr):
    """Waits for the kernel before this one, where this one may have started early.

    Then lets the next one start as soon as there is room, to wait in the same way.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _products(
    w_ptr, n, n_mask, k0, v, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(n, BLOCK_K) fp32: rows n of a weight (N, K), or columns of (K, N), times v from depth k0."""
    k = k0 + tl.arange(0, BLOCK_K)
    at = k[None, :] * N + n[:, None] if TRANSPOSED else n[:, None] * K + k[None, :]
    w = tl.load(w_ptr + at, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
    return w.to(tl.float32) * v[None, :]


@triton.jit
def _vector(v_ptr, k0, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = k0 + tl.arange(0, BLOCK_K)
    return tl.load(v_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def decode_up_kernel(
    x_ptr, ids_ptr, up_ptr, bias_ptr, a_ptr, NUM_EXPERTS,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """a[slot] = gate(up[expert] x[token] + bias), BLOCK_N columns of a per program."""
    U: tl.constexpr = 2 * I if GATED else I
    _after_previous(EARLY)
    slot = tl.program_id(0)
    e = tl.load(ids_ptr + slot).to(tl.int64)
    if (e >= 0) & (e < NUM_EXPERTS):
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = cols < I
        w = up_ptr + e * U * H
        v = x_ptr + (slot // TOP_K).to(tl.int64) * H
        n_g = 2 * cols if INTERLEAVED else cols
        n_u = n_g + (1 if INTERLEAVED else I)
        acc_g = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        acc_u = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k0 in tl.static_range(0, H, BLOCK_K):  # unrolled, so that many loads are in flight
            x = _vector(v, k0, H, BLOCK_K)
            acc_g += _products(w, n_g, inside, k0, x, U, H, BLOCK_K, TRANSPOSED)
            if GATED:
                acc_u += _products(w, n_u, inside, k0, x, U, H, BLOCK_K, TRANSPOSED)
        g = tl.sum(acc_g, 1)
        if HAS_BIAS:
            g += tl.load(bias_ptr + e * U + n_g, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            u = tl.sum(acc_u, 1)
            if HAS_BIAS:
                u += tl.load(bias_ptr + e * U + n_u, mask=inside, other=0.0).to(tl.float32)
            a, _, _ = gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)
        else:
            a, _ = activation(g, ACT, ALPHA)
        at = a_ptr + slot.to(tl.int64) * I + cols
        tl.store(at, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def decode_down_kernel(
    a_ptr, ids_ptr, weights_ptr, down_ptr, bias_ptr, out_ptr, NUM_EXPERTS,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order and in fp32, of weight * (down[expert] a[slot] + bias)."""
    _after_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < H
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = t * TOP_K + k
        e = tl.load(ids_ptr + slot).to(tl.int64)
        real = (e >= 0) & (e < NUM_EXPERTS)  # a mask, not a branch: loads of the next k overlap
        e = tl.where(real, e, 0)
        weight = tl.where(real, tl.load(weights_ptr + slot).to(tl.float32), 0.0)
        for i0 in tl.static_range(0, I, BLOCK_K):
            i = i0 + tl.arange(0, BLOCK_K)
            a = tl.load(a_ptr + slot * I + i, mask=(i < I) & real, other=0.0).to(tl.float32)
            acc += _products(
                down_ptr + e * H * I, cols, inside & real, i0, a * weight, H, I, BLOCK_K, TRANSPOSED
            )
        if HAS_BIAS:
            b = tl.load(bias_ptr + e * H + cols, mask=inside, other=0.0).to(tl.float32)
            bias += weight * b
    out = tl.sum(acc, 1) + bias
    tl.store(out_ptr + t * H + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
