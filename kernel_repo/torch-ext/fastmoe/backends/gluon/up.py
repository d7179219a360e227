"""The up projection with the gate in its epilogue.

Four warps fill a ring of stages, rows of x gathered by cp.async and the weight by bulk copy; two
warpgroups multiply, 64 rows of the tile each, and hand h, in two pieces, and a one after the other
to copies that end at the expert's last row. A warpgroup whose 64 rows lie past that end multiplies
nothing.

Shapes: x (T, K) gathered through perm; w (E, 2I, K), its gate half first, or INTERLEAVED, then also
TRANSPOSED (E, K, 2I); bias (E, 2I); h (S, 2I) and a (S, I) in ragged rows
(backends/triton/gemm.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .gated import gate_and_slopes
from .pipeline import (
    first_sums,
    gather_rows,
    halves,
    make_barriers,
    multiply_tile,
    pass_stages,
    put_rows,
    rows_of,
)

PRODUCER_WARPS = gl.constexpr(4)
LANES = gl.constexpr(4)  # that share a row of a step: fewer rows for each, and their addresses


@gluon.jit
def _multiply(
    bias_ptr, h_desc, h_up_desc, a_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
    x_bufs, w_bufs, out, full, empty, I: gl.constexpr, K: gl.constexpr,
    INTERLEAVED: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    STORE_H: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    j = gl.arange(0, 2 * BLOCK_N, gl.SliceLayout(0, layout))
    num_m = gl.load(num_tiles_ptr)
    stage = 0
    phase = 0
    start = gl.program_id(0)
    e, row0, jn, end = rows_of(start, num_m, tiles_ptr, offsets_ptr, N_TILES, GROUP_M)
    for t in range(start, num_m * N_TILES, PROGRAMS):
        next_e, next_row0, next_jn, next_end = rows_of(
            t + PROGRAMS, num_m, tiles_ptr, offsets_ptr, N_TILES, GROUP_M
        )
        if row0 + GROUP * ROWS < end:
            column = 2 * jn * BLOCK_N + j
            if not INTERLEAVED:
                column = jn * BLOCK_N + j % BLOCK_N + j // BLOCK_N * I
            acc = first_sums(bias_ptr, e, column, 2 * I, HAS_BIAS, ROWS, layout)
            acc, stage, phase = multiply_tile(
                acc, x_bufs, w_bufs, full, empty, stage, phase,
                K, TRANSPOSED, True, BLOCK_K, STAGES, GROUP,
            )  # fmt: skip
            left, right = halves(acc)
            if INTERLEAVED:
                g, u = acc.reshape((ROWS, BLOCK_N, 2)).split()
                left_col = 2 * jn * BLOCK_N
                right_col = left_col + BLOCK_N
            else:
                g = left
                u = right
                left_col = jn * BLOCK_N
                right_col = left_col  # h_up_desc begins at the up half
            row = row0 + GROUP * ROWS
            if STORE_H:
                put_rows(h_desc, out, left, row, end, left_col)
                put_rows(h_up_desc, out, right, row, end, right_col)
            a, _, _ = gate_and_slopes(g, u, ACT, ALPHA, LIMIT, OFFSET)
            put_rows(a_desc, out, a, row, end, jn * BLOCK_N)
        else:
            stage, phase = pass_stages(full, empty, stage, phase, K, BLOCK_K, STAGES)
        e = next_e
        row0 = next_row0
        jn = next_jn
        end = next_end
    tma.store_wait(0)


@gluon.jit
def up_gate_kernel(
    x_ptr, w_desc, bias_ptr, h_desc, h_up_desc, a_desc,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    I: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr,
    INTERLEAVED: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    STORE_H: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """h = x[token] @ w[e] + bias and a = gate(h), BLOCK_N columns of a per tile.

    h goes to h_desc and h_up_desc: g and u, or INTERLEAVED the left and right columns of a tile.
    """
    W_COLUMNS: gl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    dtype: gl.constexpr = w_desc.dtype
    x_layout: gl.constexpr = gl.NVMMASharedLayout(128, w_desc.layout.element_bitwidth, 2)
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_layout)
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    out_bufs = gl.allocate_shared_memory(dtype, [2] + a_desc.block_type.shape, a_desc.layout)
    full, empty = make_barriers(STAGES, PRODUCER_WARPS)
    gl.warp_specialize(
        [
            (_multiply, (
                bias_ptr, h_desc, h_up_desc, a_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, out_bufs.index(0), full, empty, I, K,
                INTERLEAVED, TRANSPOSED, HAS_BIAS, STORE_H, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(0),
            )),
            (_multiply, (
                bias_ptr, h_desc, h_up_desc, a_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, out_bufs.index(1), full, empty, I, K,
                INTERLEAVED, TRANSPOSED, HAS_BIAS, STORE_H, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(1),
            )),
            (gather_rows, (
                x_ptr, w_desc, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
                x_bufs, w_bufs, full, empty, 2 * I, K, TOP_K, TRANSPOSED,
                BLOCK_M, W_COLUMNS, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS,
                PRODUCER_WARPS, LANES,
            )),
        ],
        [4, 4],
        [208, 88],
    )  # fmt: skip
