"""The grouped GEMM: each expert's rows against its weight, walked by a persistent grid.

Shapes: rows (S, K) or, gathered, x (T, K) through perm; weights (E, N, K) or transposed (E, K, N);
out (S, N). A tile is block_m rows of one expert by BLOCK_N columns. Which tiles exist is data
(tiles, num_tiles); the grid is not.

Bulk copies (TMA) of sorted rows end where the expert's rows do, which is not an end that a
descriptor could know. As in triton.tools.ragged_tma, two coordinates beside the row move the array
so that a bound of ROWS_BOUND rows comes to lie there: addresses wrap around at 2**64 bytes.
"""

import triton
import triton.language as tl

ROWS_BOUND = tl.constexpr(1 << 30)


@triton.jit
def in_groups(t, num_m, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of tile t of num_m by N_TILES, walked in groups of GROUP_M rows.

    Programs at work together so share the operands of a square of tiles in L2. Past the end, some
    row that exists (if any does).
    """
    first = t // (GROUP_M * N_TILES) * GROUP_M
    size = tl.maximum(tl.minimum(num_m - first, GROUP_M), 1)
    inside = t % (GROUP_M * N_TILES)
    return first + inside % size, inside // size


@triton.jit
def tile_of(t, tiles_ptr, num_m, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Expert, first row and column tile of work item t."""
    m, jn = in_groups(t, num_m, N_TILES, GROUP_M)
    return tl.load(tiles_ptr + 2 * m), tl.load(tiles_ptr + 2 * m + 1), jn


@triton.jit
def load_weight(
    w, e, n0, k0, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK_N) of expert e's weight from column n0 and depth k0.

    w is a descriptor (TMA) or a pointer.
    """
    if TMA:
        if TRANSPOSED:
            tile = w.load([(e * K + k0).to(tl.int32), n0])
        else:
            tile = w.load([(e * N + n0).to(tl.int32), k0]).T
    else:
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        at = (
            w
            + e.to(tl.int64) * N * K
            + (k.to(tl.int64) * N + n if TRANSPOSED else n.to(tl.int64) * K + k)
        )
        tile = tl.load(at, mask=(k < K) & (n < N), other=0.0)
    return tile


@triton.jit
def load_gate_up_weight(
    w, e, col0, k0, I, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, 2 * BLOCK_N) of a concatenated weight.

    The gate columns from col0, then the up columns from col0. The descriptor splits the 2I columns
    in two: (2E, I, K) in boxes (2, BLOCK_N, BLOCK_K), or transposed (EK, 2, I).
    """
    if TMA:
        if TRANSPOSED:
            box = w.load([(e * K + k0).to(tl.int32), 0, col0])
            tile = tl.reshape(box, (BLOCK_K, 2 * BLOCK_N))
        else:
            box = w.load([2 * e, col0, k0])
            tile = tl.reshape(box, (2 * BLOCK_N, BLOCK_K)).T
    else:
        j = tl.arange(0, 2 * BLOCK_N)[None, :]
        col = col0 + j % BLOCK_N
        n = col + (j // BLOCK_N) * I
        k = k0 + tl.arange(0, BLOCK_K)[:, None]
        at = (
            w
            + e.to(tl.int64) * 2 * I * K
            + (k.to(tl.int64) * 2 * I + n if TRANSPOSED else n.to(tl.int64) * K + k)
        )
        tile = tl.load(at, mask=(k < K) & (col < I), other=0.0)
    return tile


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right half of the columns of a tile.

    A renaming of registers in the layouts of MMA results.
    """
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. Of fp32 operands every step is summed by itself first.

    One chain of sums over the whole depth has twice cuBLAS's error at depth 2048 (H200). The fma
    by one keeps Triton from folding the sum into the product again.
    """
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def row_pointers(
    x_ptr, perm_ptr, row0, end, K, BLOCK_M: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr
):
    """Pointers (BLOCK_M, 1) to the first element of a tile's rows, the rows, and which exist."""
    rows = row0 + tl.arange(0, BLOCK_M)
    exists = rows < end
    if GATHER:
        source = tl.load(perm_ptr + rows, mask=exists, other=0) // TOP_K
    else:
        source = tl.where(exists, rows, row0)
    return x_ptr + source.to(tl.int64)[:, None] * K, rows, exists


@triton.jit
def load_rows(pointers, exists, k0, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """(BLOCK_M, BLOCK_K) of the rows from depth k0; zeros past K and for rows that do not exist."""
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    if EVEN_K:
        return tl.load(pointers + k, mask=exists[:, None], other=0.0)
    else:
        return tl.load(pointers + k, mask=exists[:, None] & (k < K), other=0.0)


@triton.jit
def store_rows(out, tile, row0, end, col0, N, STRIDE, TMA: tl.constexpr, PIECES: tl.constexpr):
    """Writes the rows of a tile before `end` to out (S, N), at columns from col0 and before N.

    out is a descriptor of ragged rows (TMA) or a pointer to rows STRIDE apart. A bulk copy has its
    source in shared memory, so PIECES (1 or 2) column pieces go one after the other.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1] // PIECES
    if not TMA:
        rows = row0 + tl.arange(0, ROWS)
        cols = col0 + tl.arange(0, tile.shape[1])
        at = out + rows.to(tl.int64)[:, None] * STRIDE + cols[None, :]
        tl.store(
            at, tile.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :]
        )
    elif PIECES == 1:
        piece = tl.reshape(tile.to(out.dtype), (1, 1, ROWS, COLUMNS))
        out.store([ROWS_BOUND, end, ROWS_BOUND - end + row0, col0], piece)
    else:
        tl.static_assert(PIECES == 2)
        left, right = halves(tile, ROWS, tile.shape[1])
        store_rows(out, left, row0, end, col0, N, STRIDE, TMA, 1)
        store_rows(out, right, row0, end, col0 + COLUMNS, N, STRIDE, TMA, 1)


@triton.jit
def grouped_linear_kernel(
    x, w, bias_ptr, out, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    N, K: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, TMA_OUT: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    N_TILES: tl.constexpr, NUM_PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out = rows @ w[e] + bias; x, w and out are descriptors (TMA) or pointers."""
    num_m = tl.load(num_tiles_ptr)
    for t in tl.range(tl.program_id(0), num_m * N_TILES, NUM_PROGRAMS, flatten=FLATTEN):
        e, row0, jn = tile_of(t, tiles_ptr, num_m, N_TILES, GROUP_M)
        end = tl.load(offsets_ptr + e + 1)
        if not TMA_X:
            pointers, _, exists = row_pointers(x, perm_ptr, row0, end, K, BLOCK_M, TOP_K, GATHER)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            if TMA_X:
                box = x.load([ROWS_BOUND, end, ROWS_BOUND - end + row0, k0])
                a = tl.reshape(box, (BLOCK_M, BLOCK_K))
            else:
                a = load_rows(pointers, exists, k0, K, BLOCK_K, K % BLOCK_K == 0)
            b = load_weight(w, e, jn * BLOCK_N, k0, N, K, BLOCK_N, BLOCK_K, TMA_W, TRANSPOSED)
            acc = multiply_add(a, b, acc, PRECISION)
        if HAS_BIAS:
            cols = jn * BLOCK_N + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + e.to(tl.int64) * N + cols, mask=cols < N, other=0.0).to(
                tl.float32
            )[None, :]
        store_rows(out, acc, row0, end, jn * BLOCK_N, N, N, TMA_OUT, PIECES)
