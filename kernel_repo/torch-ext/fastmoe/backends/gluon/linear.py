"""The grouped GEMM over sorted rows, all of it by bulk copies.

A producer's warp fills a ring of stages; two warpgroups multiply, 64 rows of the tile each, and
leave their results to copies that end at the expert's last row. A warpgroup whose 64 rows lie past
that end multiplies nothing.

Shapes: x (S, K) and out (S, N) in ragged rows (backends/triton/gemm.py); weights (E, N, K) or
transposed (E, K, N), their experts as one matrix; bias (E, N).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..triton.gemm import ROWS_BOUND
from .pipeline import (
    advance,
    first_sums,
    make_barriers,
    multiply_tile,
    pass_stages,
    put_rows,
    rows_of,
)


@gluon.jit
def _produce(
    x_desc, w_desc, offsets_ptr, tiles_ptr, num_tiles_ptr, x_bufs, w_bufs, full, empty,
    N: gl.constexpr, K: gl.constexpr, TRANSPOSED: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    num_m = gl.load(num_tiles_ptr)
    stage = 0
    phase = 0
    start = gl.program_id(0)
    e, row0, jn, end = rows_of(start, num_m, tiles_ptr, offsets_ptr, N_TILES, GROUP_M)
    for t in range(start, num_m * N_TILES, PROGRAMS):
        next_e, next_row0, next_jn, next_end = rows_of(
            t + PROGRAMS, num_m, tiles_ptr, offsets_ptr, N_TILES, GROUP_M
        )
        for k0 in range(0, K, BLOCK_K):
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(barrier, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            at = [ROWS_BOUND, end, ROWS_BOUND - end + row0, k0]
            tma.async_copy_global_to_shared(x_desc, at, barrier, x_bufs.index(stage))
            if TRANSPOSED:
                at_w = [e * K + k0, jn * BLOCK_N]
            else:
                at_w = [e * N + jn * BLOCK_N, k0]
            tma.async_copy_global_to_shared(w_desc, at_w, barrier, w_bufs.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        e = next_e
        row0 = next_row0
        jn = next_jn
        end = next_end


@gluon.jit
def _multiply(
    bias_ptr, out_desc, offsets_ptr, tiles_ptr, num_tiles_ptr, x_bufs, w_bufs, out, full, empty,
    N: gl.constexpr, K: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = out_desc.block_type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    j = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
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
            acc = first_sums(bias_ptr, e, jn * BLOCK_N + j, N, HAS_BIAS, ROWS, layout)
            acc, stage, phase = multiply_tile(
                acc, x_bufs, w_bufs, full, empty, stage, phase,
                K, TRANSPOSED, False, BLOCK_K, STAGES, GROUP,
            )  # fmt: skip
            put_rows(out_desc, out, acc, row0 + GROUP * ROWS, end, jn * BLOCK_N)
        else:
            stage, phase = pass_stages(full, empty, stage, phase, K, BLOCK_K, STAGES)
        e = next_e
        row0 = next_row0
        jn = next_jn
        end = next_end
    tma.store_wait(0)


@gluon.jit
def grouped_linear_kernel(
    x_desc, w_desc, bias_ptr, out_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
    N: gl.constexpr, K: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """out = x @ w[e] + bias, each expert's rows by its weight."""
    dtype: gl.constexpr = w_desc.dtype
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    out_bufs = gl.allocate_shared_memory(dtype, [2] + out_desc.block_type.shape, out_desc.layout)
    full, empty = make_barriers(STAGES, 0)
    gl.warp_specialize(
        [
            (_multiply, (
                bias_ptr, out_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, out_bufs.index(0), full, empty, N, K, TRANSPOSED, HAS_BIAS,
                BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(0),
            )),
            (_multiply, (
                bias_ptr, out_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, out_bufs.index(1), full, empty, N, K, TRANSPOSED, HAS_BIAS,
                BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(1),
            )),
            (_produce, (
                x_desc, w_desc, offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, full, empty, N, K, TRANSPOSED,
                BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS,
            )),
        ],
        [4, 1],
        [208, 48],
    )  # fmt: skip
