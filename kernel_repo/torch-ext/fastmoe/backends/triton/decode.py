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
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """a[slot] = gate(up[expert] x[token] + bias), BLOCK_N columns of a per program.

    UNROLL steps in a row have their loads in flight together.
    """
    U: tl.constexpr = 2 * I if GATED else I
    PAIRS: tl.constexpr = GATED and INTERLEAVED
    WIDE: tl.constexpr = 2 * BLOCK_N if PAIRS else BLOCK_N  # columns of h that lie side by side
    _after_previous(EARLY)
    slot = tl.program_id(0)
    e = tl.load(ids_ptr + slot).to(tl.int64)
    if (e >= 0) & (e < NUM_EXPERTS):
        cols = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
        inside = cols < (U if PAIRS else I)
        w = up_ptr + e * U * H
        v = x_ptr + (slot // TOP_K).to(tl.int64) * H
        acc = tl.zeros((WIDE, BLOCK_K), tl.float32)
        acc_u = tl.zeros((WIDE, BLOCK_K), tl.float32)
        for first in range(0, H, BLOCK_K * UNROLL):
            for step in tl.static_range(UNROLL):
                k0 = first + step * BLOCK_K
                x = _vector(v, k0, H, BLOCK_K)
                acc += _products(w, cols, inside, k0, x, U, H, BLOCK_K, TRANSPOSED)
                if GATED and not INTERLEAVED:
                    acc_u += _products(w, cols + I, inside, k0, x, U, H, BLOCK_K, TRANSPOSED)
        h = tl.sum(acc, 1)
        if HAS_BIAS:
            h += tl.load(bias_ptr + e * U + cols, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            if INTERLEAVED:
                g, u = tl.split(tl.reshape(h, (BLOCK_N, 2)))
            else:
                g, u = h, tl.sum(acc_u, 1)
                if HAS_BIAS:
                    at_u = bias_ptr + e * U + I + cols
                    u += tl.load(at_u, mask=inside, other=0.0).to(tl.float32)
            a, _, _ = gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)
        else:
            a, _ = activation(h, ACT, ALPHA)
        cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = a_ptr + slot.to(tl.int64) * I + cols
        tl.store(at, a.to(a_ptr.dtype.element_ty), mask=cols < I)


@triton.jit
def decode_down_kernel(
    a_ptr, ids_ptr, weights_ptr, down_ptr, bias_ptr, out_ptr, NUM_EXPERTS,
    H: tl.constexpr, I: tl.constexpr, TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k, in order and in fp32, of weight * (down[expert] a[slot] + bias).

    UNROLL steps in a row, of several experts where one has fewer, have their loads in flight
    together.
    """
    STEPS: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    PER: tl.constexpr = min(STEPS, UNROLL)  # steps of one expert, and experts, in a row
    EXPERTS: tl.constexpr = min(max(UNROLL // STEPS, 1), TOP_K)
    _after_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < H
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, TOP_K, EXPERTS):
        for more in tl.static_range(EXPERTS):
            k = first + more
            slot = t * TOP_K + tl.minimum(k, TOP_K - 1)
            e = tl.load(ids_ptr + slot).to(tl.int64)
            # A mask, not a branch: loads of the next k overlap.
            real = (e >= 0) & (e < NUM_EXPERTS) & (k < TOP_K)
            e = tl.where(real, e, 0)
            weight = tl.where(real, tl.load(weights_ptr + slot).to(tl.float32), 0.0)
            w = down_ptr + e * H * I
            for first_i in range(0, I, BLOCK_K * PER):
                for step in tl.static_range(PER):
                    i0 = first_i + step * BLOCK_K
                    i = i0 + tl.arange(0, BLOCK_K)
                    a = tl.load(a_ptr + slot * I + i, mask=(i < I) & real, other=0.0)
                    v = a.to(tl.float32) * weight
                    acc += _products(w, cols, inside & real, i0, v, H, I, BLOCK_K, TRANSPOSED)
            if HAS_BIAS:
                b = tl.load(bias_ptr + e * H + cols, mask=inside, other=0.0).to(tl.float32)
                bias += weight * b
    out = tl.sum(acc, 1) + bias
    tl.store(out_ptr + t * H + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
