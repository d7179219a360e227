"""The gradient of the activation, its epilogue behind the next tile's GEMM.

Four roles in every program: a producer fills a ring of stages (rows of grad gathered by cp.async,
the weight by bulk copy); two warpgroups multiply, 64 rows of the tile each, and leave their sums in
shared memory, rounded to 16 bits; the last two warps take them from there, apply the gate's
backward and write, while the next tile is multiplied. A warpgroup whose 64 rows lie past the
expert's end multiplies nothing.

Shapes: grad (T, K) gathered through perm; w (E, N, K), or transposed (E, K, N); h, grad_h (S, 2N),
its gate half first; a (S, N).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..triton.gated import gate_forward
from .pipeline import (
    advance,
    before,
    copy_rows,
    make_barriers,
    multiply_stage,
    pass_stages,
    rows_of,
    tile_of,
)

PRODUCER_WARPS = gl.constexpr(2)
EPILOGUE_WARPS = gl.constexpr(2)
STEP = gl.constexpr(4)  # rows that the epilogue takes at once
H_STAGES = gl.constexpr(3)  # steps of h that it reads ahead


@gluon.jit
def _produce(
    grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [PRODUCER_WARPS, 1], [1, 0])
    i = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    cols = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout)), 0)
    num_m = gl.load(num_tiles_ptr)
    stage = 0
    phase = 0
    # Which tile comes next is read two tiles ahead, and its rows' slots one tile ahead.
    start = gl.program_id(0)
    e, row0, jn = tile_of(start, num_m, tiles_ptr, N_TILES, GROUP_M)
    next_e, next_row0, next_jn = tile_of(start + PROGRAMS, num_m, tiles_ptr, N_TILES, GROUP_M)
    end = gl.load(offsets_ptr + e + 1)
    total = gl.load(offsets_ptr + num_experts)
    slots = gl.load(perm_ptr + row0 + i, mask=row0 + i < total, other=0)
    for t in range(start, num_m * N_TILES, PROGRAMS):
        next_end = gl.load(offsets_ptr + next_e + 1)
        exists = row0 + i < end
        token = gl.where(exists, slots // TOP_K, 0)
        pointers = gl.expand_dims(grad_ptr + token.to(gl.int64) * K, 1) + cols
        slots = gl.load(perm_ptr + next_row0 + i, mask=next_row0 + i < total, other=0)
        after = t + 2 * PROGRAMS
        after_e, after_row0, after_jn = tile_of(after, num_m, tiles_ptr, N_TILES, GROUP_M)
        for k0 in range(0, K, BLOCK_K):
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(barrier, w_desc.block_type.nbytes)
            if TRANSPOSED:
                at = [e * K + k0, jn * BLOCK_N]
            else:
                at = [e * N + jn * BLOCK_N, k0]
            tma.async_copy_global_to_shared(w_desc, at, barrier, w_bufs.index(stage))
            copy_rows(x_bufs.index(stage), pointers + k0, gl.expand_dims(exists, 1), barrier)
            stage, phase = advance(stage, phase, STAGES)
        e = next_e
        row0 = next_row0
        jn = next_jn
        end = next_end
        next_e = after_e
        next_row0 = after_row0
        next_jn = after_jn


@gluon.jit
def _multiply(
    grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    num_m = gl.load(num_tiles_ptr)
    stage = 0
    phase = 0
    turn = 0
    start = gl.program_id(0)
    e, row0, jn = tile_of(start, num_m, tiles_ptr, N_TILES, GROUP_M)
    next_e, next_row0, jn = tile_of(start + PROGRAMS, num_m, tiles_ptr, N_TILES, GROUP_M)
    end = gl.load(offsets_ptr + e + 1)
    for t in range(start, num_m * N_TILES, PROGRAMS):
        next_end = gl.load(offsets_ptr + next_e + 1)
        e, after_row0, jn = tile_of(t + 2 * PROGRAMS, num_m, tiles_ptr, N_TILES, GROUP_M)
        if row0 + GROUP * ROWS < end:
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
            for k0 in range(0, K, BLOCK_K):
                mbarrier.wait(full.index(stage), phase)
                fence_async_shared()  # cp.async wrote the rows, wgmma reads by the other proxy
                x_k = x_bufs.index(stage).slice(GROUP * ROWS, ROWS, 0)
                if TRANSPOSED:
                    w_k = w_bufs.index(stage)
                else:
                    w_k = w_bufs.index(stage).permute((1, 0))
                acc, stage, phase = multiply_stage(
                    x_k, w_k, acc, empty, stage, phase, k0 == 0, STAGES
                )
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(before(stage, STAGES)), count=1)
            mbarrier.wait(drained.index(GROUP), turn ^ 1)
            d_bufs.index(GROUP).store(acc.to(d_bufs.dtype))
        else:
            stage, phase = pass_stages(full, empty, stage, phase, K, BLOCK_K, STAGES)
            mbarrier.wait(drained.index(GROUP), turn ^ 1)
            d_bufs.index(GROUP).store(gl.zeros((ROWS, BLOCK_N), d_bufs.dtype, layout))
        mbarrier.arrive(dumped.index(GROUP), count=1)
        turn ^= 1
        row0 = next_row0
        end = next_end
        next_e = e
        next_row0 = after_row0


@gluon.jit
def _finish(
    grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = BLOCK_M // 2 // STEP
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [EPILOGUE_WARPS, 1], [1, 0])
    i = gl.arange(0, STEP, gl.SliceLayout(1, layout))
    j = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    sums = d_bufs._reinterpret(d_bufs.dtype, [2 * STEPS, STEP, BLOCK_N], d_bufs.layout)
    num_m = gl.load(num_tiles_ptr)
    turn = 0
    for t in range(gl.program_id(0), num_m * N_TILES, PROGRAMS):
        e, row0, jn, end = rows_of(t, num_m, tiles_ptr, offsets_ptr, N_TILES, GROUP_M)
        cols = jn * BLOCK_N + j
        _read_weights(s_buf, weights_ptr, perm_ptr, row0, end, BLOCK_M)
        for early in gl.static_range(H_STAGES):
            _read_h(g_bufs, u_bufs, early, h_ptr, row0 + early * STEP + i, cols, end, N)
        for half in range(2):
            mbarrier.wait(dumped.index(half), turn)
            for k in range(STEPS):
                step = half * STEPS + k
                slot = step % H_STAGES
                rows = row0 + step * STEP + i
                async_copy.wait_group(H_STAGES - 1)
                _write_rows(
                    sums.index(step).load(layout), g_bufs.index(slot).load(layout),
                    u_bufs.index(slot).load(layout),
                    s_buf.index(step).load(gl.SliceLayout(1, layout)), rows, cols, end,
                    grad_h_ptr, a_ptr, dots_ptr, jn, N, KEEP_A, ACT, ALPHA, LIMIT, OFFSET, N_TILES,
                )  # fmt: skip
                _read_h(g_bufs, u_bufs, slot, h_ptr, rows + H_STAGES * STEP, cols, end, N)
            mbarrier.arrive(drained.index(half), count=1)
        async_copy.wait_group(0)
        turn ^= 1


@gluon.jit
def _read_weights(s_buf, weights_ptr, perm_ptr, row0, end, BLOCK_M: gl.constexpr):
    """The routing weights of a tile's rows into s_buf, zero where there is no row."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [EPILOGUE_WARPS], [0])
    rows = row0 + gl.arange(0, BLOCK_M, layout)
    slots = gl.load(perm_ptr + rows, mask=rows < end, other=0)
    s = gl.load(weights_ptr + slots, mask=rows < end, other=0.0)
    s_buf._reinterpret(gl.float32, [BLOCK_M], s_buf.layout).store(s.to(gl.float32))


@gluon.jit
def _read_h(g_bufs, u_bufs, slot, h_ptr, rows, cols, end, N: gl.constexpr):
    """Starts copying g and u of h at these rows and columns, zero where there is none."""
    exists = gl.expand_dims(rows < end, 1) & gl.expand_dims(cols < N, 0)
    at = _at(h_ptr, rows, cols, 2 * N)
    async_copy.async_copy_global_to_shared(g_bufs.index(slot), at, mask=exists)
    async_copy.async_copy_global_to_shared(u_bufs.index(slot), at + N, mask=exists)
    async_copy.commit_group()


@gluon.jit
def _at(ptr, rows, cols, width):
    """Pointers to these rows and columns of a matrix of this width."""
    return ptr + gl.expand_dims(rows.to(gl.int64), 1) * width + gl.expand_dims(cols, 0)


@gluon.jit
def _write_rows(
    d, g, u, s, rows, cols, end, grad_h_ptr, a_ptr, dots_ptr, jn,
    N: gl.constexpr, KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr, N_TILES: gl.constexpr,
):  # fmt: skip
    """grad_h, s*a and <d, a> of some rows."""
    inside = gl.expand_dims(cols < N, 0)
    d = d.to(gl.float32)
    if N % d.shape[1] != 0:
        d = gl.where(inside, d, 0.0)
    a, by_g, by_u = _gate(g.to(gl.float32), u.to(gl.float32), ACT, ALPHA, LIMIT, OFFSET)
    dots = gl.sum(d * a, 1)
    gl.store(dots_ptr + rows.to(gl.int64) * N_TILES + jn, dots, mask=rows < end)
    s = gl.expand_dims(s, 1)
    d *= s
    put = gl.expand_dims(rows < end, 1) & inside
    at = _at(grad_h_ptr, rows, cols, 2 * N)
    gl.store(at, (d * by_g).to(g.dtype), mask=put)
    gl.store(at + N, (d * by_u).to(g.dtype), mask=put)
    if KEEP_A:
        gl.store(_at(a_ptr, rows, cols, N), (a * s).to(g.dtype), mask=put)


@gluon.jit
def _gate(g, u, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, OFFSET: gl.constexpr):
    """`gate_forward`; SwiGLU with half of the instructions, denormal numbers taken for zero."""
    if ACT == "silu" and LIMIT == float("inf"):
        power = gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [g * (-1.4426950408889634 * ALPHA)],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        sigmoid = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        value = g * sigmoid
        linear = u + OFFSET if OFFSET != 0.0 else u
        by_g = linear * (sigmoid + ALPHA * value * (1.0 - sigmoid))
        return value * linear, by_g, value
    else:
        return gate_forward(g, u, ACT, ALPHA, LIMIT, OFFSET)


@gluon.jit
def gate_backward_kernel(
    grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """grad_h = gate'(h) * s*d, s*a (if KEEP_A), and this column tile's share of <d, a>.

    d is grad[token] @ w[e]. As `gate_backward_kernel` of backends/triton/gated.py, but for d, which
    is rounded to the dtype of grad between the GEMM and the gate.
    """
    dtype: gl.constexpr = w_desc.dtype
    # Swizzled so that a step's rows are a buffer of their own.
    plain: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    scalars: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], w_desc.layout)
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    d_bufs = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, BLOCK_N], plain)
    g_bufs = gl.allocate_shared_memory(dtype, [H_STAGES, STEP, BLOCK_N], plain)
    u_bufs = gl.allocate_shared_memory(dtype, [H_STAGES, STEP, BLOCK_N], plain)
    s_buf = gl.allocate_shared_memory(gl.float32, [BLOCK_M // STEP, STEP], scalars)
    full, empty = make_barriers(STAGES, PRODUCER_WARPS)
    dumped = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(dumped.index(half), count=1)
        mbarrier.init(drained.index(half), count=1)
    gl.warp_specialize(
        [
            (_multiply, (
                grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
                perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
                x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
                N, K, TOP_K, TRANSPOSED, KEEP_A, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(0),
            )),
            (_multiply, (
                grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
                perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
                x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
                N, K, TOP_K, TRANSPOSED, KEEP_A, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(1),
            )),
            (_produce, (
                grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
                perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
                x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
                N, K, TOP_K, TRANSPOSED, KEEP_A, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS,
            )),
            (_finish, (
                grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
                perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
                x_bufs, w_bufs, d_bufs, g_bufs, u_bufs, s_buf, full, empty, dumped, drained,
                N, K, TOP_K, TRANSPOSED, KEEP_A, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS,
            )),
        ],
        [4, 2, 2],
        [184, 136, 136],
    )  # fmt: skip
