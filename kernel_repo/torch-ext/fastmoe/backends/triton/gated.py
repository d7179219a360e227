"""The two GEMMs around the gate, forward and backward, with the gate in their epilogues.

The up projection applies the activation; the gradient of the activation applies the gate's backward
and yields the routing weight's gradient and the weighted activation.

Shapes: x, grad (T, H) gathered through perm; h, grad_h (S, U) with U = 2I gated or I; a (S, I);
weights per slot (S,).
"""

import triton
import triton.language as tl

from .gemm import (
    halves,
    load_gate_up_weight,
    load_rows,
    load_weight,
    multiply_add,
    row_pointers,
    store_rows,
    tile_of,
)


@triton.jit
def _erf_gelu(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _tanh_gelu(x):
    t = 2.0 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1.0
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (
        1.0 + 0.134145 * x * x
    )
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
def bounded(g, LIMIT: tl.constexpr):
    """What the activation sees of g; LIMIT is infinite where there is none."""
    if LIMIT == float("inf"):
        return g
    else:
        return tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gated(g, u, value, slope, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """(a, da/dg, da/du) from g, u and the activation and its derivative at `bounded` g, fp32."""
    if LIMIT == float("inf"):
        linear = u + OFFSET if OFFSET != 0.0 else u
        return value * linear, linear * slope, value
    else:
        linear = tl.clamp(u, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) + OFFSET
        by_g = tl.where(g <= LIMIT, linear * slope, 0.0)
        by_u = tl.where(tl.abs(u) <= LIMIT, value, 0.0)
        return value * linear, by_g, by_u


@triton.jit
def gate_forward(
    g, u, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr
):
    """(a, da/dg, da/du) of the gated activation at fp32 g and u."""
    value, slope = activation(bounded(g, LIMIT), ACT, ALPHA)
    return gated(g, u, value, slope, LIMIT, OFFSET)


@triton.jit
def up_gate_kernel(
    x_ptr, w, bias_ptr, h, h_up, a, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    I: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_H: tl.constexpr,
    TMA_W: tl.constexpr, TMA_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    N_TILES: tl.constexpr, NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """h = x[token] @ w[e] + bias and a = gate(h).

    BLOCK_N columns of a per tile, their g and u in one accumulator. w, h and a are descriptors
    (TMA) or pointers. h is written in two pieces; concatenated, these are g and u, and h and h_up
    describe its halves.
    """
    SPLIT: tl.constexpr = GATED and not INTERLEAVED
    WIDE: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    U: tl.constexpr = 2 * I if GATED else I
    num_m = tl.load(num_tiles_ptr)
    for t in tl.range(tl.program_id(0), num_m * N_TILES, NUM_PROGRAMS, flatten=FLATTEN):
        e, row0, jn = tile_of(t, tiles_ptr, num_m, N_TILES, GROUP_M)
        end = tl.load(offsets_ptr + e + 1)
        pointers, _, exists = row_pointers(x_ptr, perm_ptr, row0, end, K, BLOCK_M, TOP_K, True)
        acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x_k = load_rows(pointers, exists, k0, K, BLOCK_K, K % BLOCK_K == 0)
            if SPLIT:
                w_k = load_gate_up_weight(
                    w, e, jn * BLOCK_N, k0, I, K, BLOCK_N, BLOCK_K, TMA_W, TRANSPOSED
                )
            else:
                w_k = load_weight(w, e, jn * WIDE, k0, U, K, WIDE, BLOCK_K, TMA_W, TRANSPOSED)
            acc = multiply_add(x_k, w_k, acc, PRECISION)
        if HAS_BIAS:
            j = tl.arange(0, WIDE)
            if SPLIT:
                wide = jn * BLOCK_N + j % BLOCK_N + (j // BLOCK_N) * I
                inside = jn * BLOCK_N + j % BLOCK_N < I
            else:
                wide = jn * WIDE + j
                inside = wide < U
            acc += tl.load(bias_ptr + e.to(tl.int64) * U + wide, mask=inside, other=0.0).to(
                tl.float32
            )[None, :]
        if SPLIT:
            g, u = halves(acc, BLOCK_M, WIDE)
            if STORE_H:
                store_rows(h, g, row0, end, jn * BLOCK_N, I, U, TMA_OUT, 1)
                store_rows(h_up if TMA_OUT else h + I, u, row0, end, jn * BLOCK_N, I, U, TMA_OUT, 1)
        else:
            if STORE_H:
                store_rows(h, acc, row0, end, jn * WIDE, U, U, TMA_OUT, 2)
            if GATED:
                g, u = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
        if GATED:
            gated, _, _ = gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)
        else:
            gated, _ = activation(acc, ACT, ALPHA)
        store_rows(a, gated, row0, end, jn * BLOCK_N, I, I, TMA_OUT, 1)


@triton.jit
def _gate_backward_columns(
    d, col0, s, rows, exists, h_ptr, grad_h_ptr, a_ptr,
    I: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    STORE_A: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue for the columns of d from col0: writes grad_h and s*a, returns <d, a> by row."""
    U: tl.constexpr = 2 * I if GATED else I
    cols = col0 + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (cols < I)[None, :]
    d = tl.where(inside, d, 0.0)
    row = rows.to(tl.int64)[:, None]
    if INTERLEAVED:
        pairs = 2 * col0 + tl.arange(0, 2 * COLUMNS)
        h = tl.load(
            h_ptr + row * U + pairs[None, :], mask=exists[:, None] & (pairs < U)[None, :], other=0.0
        )
        g, u = tl.split(tl.reshape(h.to(tl.float32), (ROWS, COLUMNS, 2)))
    else:
        g = tl.load(h_ptr + row * U + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load(h_ptr + row * U + I + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATED:
        a, by_g, by_u = gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)
    else:
        a, by_g = activation(g, ACT, ALPHA)
    dots = tl.sum(d * a, 1)
    d *= s[:, None]
    if INTERLEAVED:
        pair = tl.reshape(tl.join(d * by_g, d * by_u), (ROWS, 2 * COLUMNS)).to(
            grad_h_ptr.dtype.element_ty
        )
        tl.store(
            grad_h_ptr + row * U + pairs[None, :], pair, mask=exists[:, None] & (pairs < U)[None, :]
        )
    else:
        tl.store(
            grad_h_ptr + row * U + cols[None, :],
            (d * by_g).to(grad_h_ptr.dtype.element_ty),
            mask=inside,
        )
        if GATED:
            tl.store(
                grad_h_ptr + row * U + I + cols[None, :],
                (d * by_u).to(grad_h_ptr.dtype.element_ty),
                mask=inside,
            )
    if STORE_A:
        at = a_ptr + row * I + cols[None, :]
        tl.store(at, (a * s[:, None]).to(a_ptr.dtype.element_ty), mask=inside)
    return dots


@triton.jit
def gate_backward_kernel(
    grad_ptr, w, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    I: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TRANSPOSED: tl.constexpr, STORE_A: tl.constexpr, TMA_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    N_TILES: tl.constexpr, NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """grad_h = gate'(h) * s*d, s*a, and this column tile's share of <d, a>.

    d is grad[token] @ down[e]. The epilogue runs on quarters of the columns, which is what the
    registers hold beside the accumulator.
    """
    QUARTER: tl.constexpr = BLOCK_N // 4
    num_m = tl.load(num_tiles_ptr)
    for t in tl.range(tl.program_id(0), num_m * N_TILES, NUM_PROGRAMS, flatten=FLATTEN):
        e, row0, jn = tile_of(t, tiles_ptr, num_m, N_TILES, GROUP_M)
        end = tl.load(offsets_ptr + e + 1)
        pointers, rows, exists = row_pointers(
            grad_ptr, perm_ptr, row0, end, K, BLOCK_M, TOP_K, True
        )
        d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            g_k = load_rows(pointers, exists, k0, K, BLOCK_K, K % BLOCK_K == 0)
            w_k = load_weight(w, e, jn * BLOCK_N, k0, I, K, BLOCK_N, BLOCK_K, TMA_W, TRANSPOSED)
            d = multiply_add(g_k, w_k, d, PRECISION)
        slots = tl.load(perm_ptr + rows, mask=exists, other=0)
        s = tl.load(weights_ptr + slots, mask=exists, other=0.0).to(tl.float32)
        dots = tl.zeros((BLOCK_M,), tl.float32)
        left, right = halves(d, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            first, second = halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
            for quarter in tl.static_range(2):
                dots += _gate_backward_columns(
                    first if quarter == 0 else second,
                    jn * BLOCK_N + (2 * half + quarter) * QUARTER,
                    s, rows, exists, h_ptr, grad_h_ptr, a_ptr,
                    I, GATED, INTERLEAVED, ACT, ALPHA, LIMIT, OFFSET, STORE_A, BLOCK_M, QUARTER,
                )  # fmt: skip
        tl.store(dots_ptr + rows.to(tl.int64) * N_TILES + jn, dots, mask=exists)
