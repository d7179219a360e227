"""The two GEMMs around the gate: the up projection with the activation in its epilogue, and the gradient of the
activation with the gate's backward, the routing weight's gradient and the weighted activation in its epilogue.

Shapes: x, grad (T, H) gathered through perm; h, grad_h (S, U) with U = 2I gated or I; a (S, I); weights per slot (S,).
"""

import triton
import triton.language as tl

from .gemm import load_rows, load_weight, row_pointers, tile_of


@triton.jit
def _erf_gelu(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _tanh_gelu(x):
    t = 2.0 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1.0
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + t), slope


@triton.jit
def activation(x, ACT: tl.constexpr, ALPHA: tl.constexpr):
    """The activation and its derivative at x, fp32; the names are those of `fastmoe.gates.Gate`."""
    if ACT == "silu":
        s = tl.sigmoid(ALPHA * x)
        return x * s, s * (1.0 + ALPHA * x * (1.0 - s))
    elif ACT == "gelu":
        return _erf_gelu(x)
    elif ACT == "gelu_tanh":
        return _tanh_gelu(x)
    elif ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return r * r, 2.0 * r


@triton.jit
def gate_forward(g, u, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """(a, da/dg, da/du) of the gated activation at fp32 g and u; LIMIT is infinite where there is none."""
    if LIMIT == float("inf"):
        value, slope = activation(g, ACT, ALPHA)
        linear = u + OFFSET
        return value * linear, linear * slope, value
    else:
        value, slope = activation(tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL), ACT, ALPHA)
        linear = tl.clamp(u, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) + OFFSET
        by_g = tl.where(g <= LIMIT, linear * slope, 0.0)
        by_u = tl.where(tl.abs(u) <= LIMIT, value, 0.0)
        return value * linear, by_g, by_u


@triton.jit
def up_gate_kernel(
    x_ptr, w, bias_ptr, h_ptr, a_ptr, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    I: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_H: tl.constexpr, TMA_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    N_TILES: tl.constexpr, NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """h = x[token] @ w[e] + bias and a = gate(h), BLOCK_N columns of a per tile, its g and u in one pass over x."""
    U: tl.constexpr = 2 * I if GATED else I
    num_m = tl.load(num_tiles_ptr)
    for t in tl.range(tl.program_id(0), num_m * N_TILES, NUM_PROGRAMS, flatten=FLATTEN):
        e, row0, jn = tile_of(t, tiles_ptr, num_m, N_TILES, GROUP_M)
        end = tl.load(offsets_ptr + e + 1)
        pointers, rows, exists = row_pointers(x_ptr, perm_ptr, row0, end, K, BLOCK_M, TOP_K, True)
        cols = jn * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = exists[:, None] & (cols < I)[None, :]
        h_rows = h_ptr + rows.to(tl.int64)[:, None] * U
        bias = bias_ptr + e.to(tl.int64) * U
        if GATED and not INTERLEAVED:
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                rows_k = load_rows(pointers, k0, K, BLOCK_K, K % BLOCK_K == 0)
                w_g = load_weight(w, e, jn * BLOCK_N, k0, U, K, BLOCK_N, BLOCK_K, TMA_W, TRANSPOSED)
                g = tl.dot(rows_k, w_g, g, input_precision=PRECISION)
                w_u = load_weight(w, e, I + jn * BLOCK_N, k0, U, K, BLOCK_N, BLOCK_K, TMA_W, TRANSPOSED)
                u = tl.dot(rows_k, w_u, u, input_precision=PRECISION)
            if HAS_BIAS:
                g += tl.load(bias + cols, mask=cols < I, other=0.0).to(tl.float32)[None, :]
                u += tl.load(bias + I + cols, mask=cols < I, other=0.0).to(tl.float32)[None, :]
            if STORE_H:
                tl.store(h_rows + cols[None, :], g.to(h_ptr.dtype.element_ty), mask=mask)
                tl.store(h_rows + I + cols[None, :], u.to(h_ptr.dtype.element_ty), mask=mask)
        else:
            WIDE: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
            wide = jn * WIDE + tl.arange(0, WIDE)
            acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                rows_k = load_rows(pointers, k0, K, BLOCK_K, K % BLOCK_K == 0)
                w_k = load_weight(w, e, jn * WIDE, k0, U, K, WIDE, BLOCK_K, TMA_W, TRANSPOSED)
                acc = tl.dot(rows_k, w_k, acc, input_precision=PRECISION)
            if HAS_BIAS:
                acc += tl.load(bias + wide, mask=wide < U, other=0.0).to(tl.float32)[None, :]
            if STORE_H:
                tl.store(h_rows + wide[None, :], acc.to(h_ptr.dtype.element_ty), mask=exists[:, None] & (wide < U)[None, :])
            if GATED:
                g, u = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
            else:
                g = acc
        if GATED:
            a, _, _ = gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)
        else:
            a, _ = activation(g, ACT, ALPHA)
        out = a_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
        tl.store(out, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    grad_ptr, w, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    S, I: tl.constexpr, K: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TRANSPOSED: tl.constexpr, STORE_A: tl.constexpr, TMA_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    N_TILES: tl.constexpr, NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """From d = grad[token] @ down[e]: grad_h = gate'(h) * s*d, s*a, and this column tile's share of <d, a>.

    The tile of the last expert also writes zeros to its rows past the end: weight_grad's tiles of depth BLOCK_K read
    them against zeros, and must not find NaN there.
    """
    U: tl.constexpr = 2 * I if GATED else I
    num_m = tl.load(num_tiles_ptr)
    total = tl.load(offsets_ptr + NUM_EXPERTS)
    for t in tl.range(tl.program_id(0), num_m * N_TILES, NUM_PROGRAMS, flatten=FLATTEN):
        e, row0, jn = tile_of(t, tiles_ptr, num_m, N_TILES, GROUP_M)
        end = tl.load(offsets_ptr + e + 1)
        pointers, rows, exists = row_pointers(grad_ptr, perm_ptr, row0, end, K, BLOCK_M, TOP_K, True)
        d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            g_k = load_rows(pointers, k0, K, BLOCK_K, K % BLOCK_K == 0)
            w_k = load_weight(w, e, jn * BLOCK_N, k0, I, K, BLOCK_N, BLOCK_K, TMA_W, TRANSPOSED)
            d = tl.dot(g_k, w_k, d, input_precision=PRECISION)
        cols = jn * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = exists[:, None] & (cols < I)[None, :]
        d = tl.where(inside, d, 0.0)
        slots = tl.load(perm_ptr + rows, mask=exists, other=0)
        s = tl.load(weights_ptr + slots, mask=exists, other=0.0).to(tl.float32)
        writes = (rows < tl.where(end == total, S, end))[:, None] & (cols < I)[None, :]
        at = rows.to(tl.int64)[:, None] * U
        if GATED and not INTERLEAVED:
            at_g = at + cols[None, :]
            at_u = at_g + I
        elif GATED:
            at_g = at + 2 * cols[None, :]
            at_u = at_g + 1
        else:
            at_g = at + cols[None, :]
        g = tl.load(h_ptr + at_g, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load(h_ptr + at_u, mask=inside, other=0.0).to(tl.float32)
            a, by_g, by_u = gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)
        else:
            a, by_g = activation(g, ACT, ALPHA)
        dots = tl.sum(d * a, 1)
        tl.store(dots_ptr + rows.to(tl.int64) * N_TILES + jn, dots, mask=exists)
        d *= s[:, None]
        tl.store(grad_h_ptr + at_g, (d * by_g).to(grad_h_ptr.dtype.element_ty), mask=writes)
        if GATED:
            tl.store(grad_h_ptr + at_u, (d * by_u).to(grad_h_ptr.dtype.element_ty), mask=writes)
        if STORE_A:
            out = a_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
            tl.store(out, (a * s[:, None]).to(a_ptr.dtype.element_ty), mask=writes)
