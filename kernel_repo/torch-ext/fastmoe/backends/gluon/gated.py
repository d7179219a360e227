"""The gradient of the activation, its epilogue behind the next tile's GEMM.

Four roles in every program: a producer fills a ring of stages (rows of grad gathered by cp.async,
the weight by bulk copy); two warpgroups multiply, 64 rows of the tile each, and leave their sums in
shared memory, rounded to 16 bits; the last two warps take them from there, apply the gate's
backward and write, while the next tile is multiplied. A warpgroup whose 64 rows lie past the
expert's end multiplies nothing.

Shapes: grad (T, K) gathered through perm; w (E, N, K), or transposed (E, K, N); h, grad_h (S, 2N),
its gate half first, or INTERLEAVED; a (S, N).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..triton.gated import activation, bounded, gated
from .pipeline import (
    gather_rows,
    make_barriers,
    multiply_tile,
    pass_stages,
    rows_of,
    tile_of,
)

PRODUCER_WARPS = gl.constexpr(2)
LANES = gl.constexpr(8)  # that share a row of a step
EPILOGUE_WARPS = gl.constexpr(2)
STEP = gl.constexpr(4)  # rows that the epilogue takes at once
H_STAGES = gl.constexpr(4)  # steps of h that it reads ahead


@gluon.jit
def _multiply(
    offsets_ptr, tiles_ptr, num_tiles_ptr, x_bufs, w_bufs, d_buf, full, empty, dumped, drained,
    K: gl.constexpr, TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
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
            acc, stage, phase = multiply_tile(
                acc, x_bufs, w_bufs, full, empty, stage, phase,
                K, TRANSPOSED, True, BLOCK_K, STAGES, GROUP,
            )  # fmt: skip
            mbarrier.wait(drained.index(GROUP), turn ^ 1)
            d_buf.store(acc.to(d_buf.dtype))
        else:
            stage, phase = pass_stages(full, empty, stage, phase, K, BLOCK_K, STAGES)
            mbarrier.wait(drained.index(GROUP), turn ^ 1)
        mbarrier.arrive(dumped.index(GROUP), count=1)
        turn ^= 1
        row0 = next_row0
        end = next_end
        next_e = e
        next_row0 = after_row0


@gluon.jit
def _finish(
    weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr, perm_ptr, offsets_ptr, tiles_ptr,
    num_tiles_ptr, d_bufs, h_bufs, s_buf, dumped, drained,
    N: gl.constexpr, INTERLEAVED: gl.constexpr, KEEP_A: gl.constexpr, ACT: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, OFFSET: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = BLOCK_M // 2 // STEP
    # A step's addresses differ from the last one's by constants; pairs take twice the code already.
    UNROLL: gl.constexpr = 1 if INTERLEAVED else 4
    HALF: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [EPILOGUE_WARPS, 1], [1, 0])
    half: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [EPILOGUE_WARPS, 1], [1, 0])
    row: gl.constexpr = gl.SliceLayout(1, half if INTERLEAVED else layout)
    i = gl.arange(0, STEP, row)
    sums = d_bufs._reinterpret(d_bufs.dtype, [2 * STEPS, STEP, BLOCK_N], d_bufs.layout)
    num_m = gl.load(num_tiles_ptr)
    turn = 0
    for t in range(gl.program_id(0), num_m * N_TILES, PROGRAMS):
        e, row0, jn, end = rows_of(t, num_m, tiles_ptr, offsets_ptr, N_TILES, GROUP_M)
        _read_weights(s_buf, weights_ptr, perm_ptr, row0, end, BLOCK_M)
        for early in gl.static_range(H_STAGES):
            _read_h(h_bufs, early, h_ptr, row0 + early * STEP, jn, end, N, INTERLEAVED)
        for group in range(2):
            mbarrier.wait(dumped.index(group), turn)
            for k0 in range(0, STEPS, UNROLL):
                for k in gl.static_range(UNROLL):
                    step = group * STEPS + k0 + k
                    slot = step % H_STAGES
                    rows = row0 + step * STEP + i
                    async_copy.wait_group(H_STAGES - 1)
                    s = s_buf.index(step).load(row)
                    left = h_bufs.index(2 * slot)
                    right = h_bufs.index(2 * slot + 1)
                    if INTERLEAVED:
                        dots = _write_pairs(
                            sums.index(step).slice(0, HALF, 1).load(half), left.load(layout),
                            s, rows, 2 * jn, end, grad_h_ptr, a_ptr,
                            N, KEEP_A, ACT, ALPHA, LIMIT, OFFSET, BLOCK_N,
                        )  # fmt: skip
                        dots += _write_pairs(
                            sums.index(step).slice(HALF, HALF, 1).load(half), right.load(layout),
                            s, rows, 2 * jn + 1, end, grad_h_ptr, a_ptr,
                            N, KEEP_A, ACT, ALPHA, LIMIT, OFFSET, BLOCK_N,
                        )  # fmt: skip
                    else:
                        dots = _write_halves(
                            sums.index(step).load(layout), left.load(layout), right.load(layout),
                            s, rows, jn, end, grad_h_ptr, a_ptr,
                            N, KEEP_A, ACT, ALPHA, LIMIT, OFFSET, BLOCK_N,
                        )  # fmt: skip
                    gl.store(dots_ptr + rows.to(gl.int64) * N_TILES + jn, dots, mask=rows < end)
                    after = row0 + (step + H_STAGES) * STEP
                    _read_h(h_bufs, slot, h_ptr, after, jn, end, N, INTERLEAVED)
            mbarrier.arrive(drained.index(group), count=1)
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
def _read_h(h_bufs, slot, h_ptr, row0, jn, end, N: gl.constexpr, INTERLEAVED: gl.constexpr):
    """Starts copying a step's rows of h, zero where there is none, in two pieces.

    Those are g and u, or INTERLEAVED the left and right columns.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [EPILOGUE_WARPS, 1], [1, 0])
    COLUMNS: gl.constexpr = h_bufs.shape[2]
    WIDTH: gl.constexpr = 2 * N if INTERLEAVED else N  # the columns that the pieces are part of
    j = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    cols = (2 * jn if INTERLEAVED else jn) * COLUMNS + j
    rows = row0 + gl.arange(0, STEP, gl.SliceLayout(1, layout))
    exists = gl.expand_dims(rows < end, 1) & gl.expand_dims(cols < WIDTH, 0)
    at = _at(h_ptr, rows, cols, 2 * N)
    async_copy.async_copy_global_to_shared(h_bufs.index(2 * slot), at, mask=exists)
    if INTERLEAVED:
        exists = gl.expand_dims(rows < end, 1) & gl.expand_dims(cols + COLUMNS < WIDTH, 0)
        at += COLUMNS
    else:
        at += N
    async_copy.async_copy_global_to_shared(h_bufs.index(2 * slot + 1), at, mask=exists)
    async_copy.commit_group()


@gluon.jit
def _at(ptr, rows, cols, width):
    """Pointers to these rows and columns of a matrix of this width."""
    return ptr + gl.expand_dims(rows.to(gl.int64), 1) * width + gl.expand_dims(cols, 0)


@gluon.jit
def _write_halves(
    d, g, u, s, rows, jn, end, grad_h_ptr, a_ptr,
    N: gl.constexpr, KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """grad_h and s*a of some rows, g and u halves of h; returns <d, a>."""
    cols = jn * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, d.type.layout))
    by_g, by_u, dots = _write_a(
        d, g, u, s, rows, cols, end, a_ptr, N, KEEP_A, ACT, ALPHA, LIMIT, OFFSET, BLOCK_N
    )
    put = gl.expand_dims(rows < end, 1) & gl.expand_dims(cols < N, 0)
    at = _at(grad_h_ptr, rows, cols, 2 * N)
    gl.store(at, by_g.to(g.dtype), mask=put)
    gl.store(at + N, by_u.to(g.dtype), mask=put)
    return dots


@gluon.jit
def _write_pairs(
    d, h, s, rows, piece, end, grad_h_ptr, a_ptr,
    N: gl.constexpr, KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The same of one of two pieces of a tile's columns, h in pairs of g and u."""
    layout: gl.constexpr = d.type.layout
    wide: gl.constexpr = h.type.layout
    g, u = h.reshape((h.shape[0], BLOCK_N // 2, 2)).split()
    g = gl.convert_layout(g, layout, assert_trivial=True)
    u = gl.convert_layout(u, layout, assert_trivial=True)
    cols = piece * (BLOCK_N // 2) + gl.arange(0, BLOCK_N // 2, gl.SliceLayout(0, layout))
    by_g, by_u, dots = _write_a(
        d, g, u, s, rows, cols, end, a_ptr, N, KEEP_A, ACT, ALPHA, LIMIT, OFFSET, BLOCK_N
    )
    pairs = gl.join(by_g.to(h.dtype), by_u.to(h.dtype)).reshape(h.shape)
    cols = piece * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, wide))
    rows = gl.convert_layout(rows, gl.SliceLayout(1, wide), assert_trivial=True)
    put = gl.expand_dims(rows < end, 1) & gl.expand_dims(cols < 2 * N, 0)
    at = _at(grad_h_ptr, rows, cols, 2 * N)
    gl.store(at, gl.convert_layout(pairs, wide, assert_trivial=True), mask=put)
    return dots


@gluon.jit
def _write_a(
    d, g, u, s, rows, cols, end, a_ptr,
    N: gl.constexpr, KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The gradients of g and u, fp32, and <d, a>; writes s*a."""
    inside = gl.expand_dims(cols < N, 0)
    d = d.to(gl.float32)
    if N % BLOCK_N != 0:
        d = gl.where(inside, d, 0.0)
    a, by_g, by_u = gate_and_slopes(g.to(gl.float32), u.to(gl.float32), ACT, ALPHA, LIMIT, OFFSET)
    dots = gl.sum(d * a, 1)
    s = gl.expand_dims(s, 1)
    d *= s
    if KEEP_A:
        put = gl.expand_dims(rows < end, 1) & inside
        gl.store(_at(a_ptr, rows, cols, N), (a * s).to(a_ptr.dtype.element_ty), mask=put)
    return d * by_g, d * by_u, dots


@gluon.jit
def gate_and_slopes(
    g, u, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, OFFSET: gl.constexpr
):
    """`gate_forward`; silu with half of the instructions, denormal numbers taken for zero."""
    x = bounded(g, LIMIT)
    if ACT == "silu":
        power = gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * (-1.4426950408889634 * ALPHA)],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        sigmoid = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power],
            dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        value = x * sigmoid
        slope = sigmoid + ALPHA * value * (1.0 - sigmoid)
    else:
        value, slope = activation(x, ACT, ALPHA)
    return gated(g, u, value, slope, LIMIT, OFFSET)


@gluon.jit
def gate_backward_kernel(
    grad_ptr, w_desc, weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr,
    perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, INTERLEAVED: gl.constexpr,
    TRANSPOSED: gl.constexpr, KEEP_A: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
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
    h_bufs = gl.allocate_shared_memory(dtype, [2 * H_STAGES, STEP, BLOCK_N], plain)
    s_buf = gl.allocate_shared_memory(gl.float32, [BLOCK_M // STEP, STEP], scalars)
    full, empty = make_barriers(STAGES, PRODUCER_WARPS)
    dumped = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(dumped.index(group), count=1)
        mbarrier.init(drained.index(group), count=1)
    gl.warp_specialize(
        [
            (_multiply, (
                offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, d_bufs.index(0), full, empty, dumped, drained, K, TRANSPOSED,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(0),
            )),
            (_multiply, (
                offsets_ptr, tiles_ptr, num_tiles_ptr,
                x_bufs, w_bufs, d_bufs.index(1), full, empty, dumped, drained, K, TRANSPOSED,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS, gl.constexpr(1),
            )),
            (gather_rows, (
                grad_ptr, w_desc, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
                x_bufs, w_bufs, full, empty, N, K, TOP_K, TRANSPOSED,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, N_TILES, GROUP_M, PROGRAMS,
                PRODUCER_WARPS, LANES,
            )),
            (_finish, (
                weights_ptr, h_ptr, grad_h_ptr, a_ptr, dots_ptr, perm_ptr, offsets_ptr,
                tiles_ptr, num_tiles_ptr, d_bufs, h_bufs, s_buf, dumped, drained,
                N, INTERLEAVED, KEEP_A, ACT, ALPHA, LIMIT, OFFSET,
                BLOCK_M, BLOCK_N, N_TILES, GROUP_M, PROGRAMS,
            )),
        ],
        [4, 2, 2],
        [184, 136, 136],
    )  # fmt: skip
