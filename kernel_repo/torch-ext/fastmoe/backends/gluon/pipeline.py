"""What the warp-specialised kernels share: a ring of stages between one producer and two consumers,
and a queue of tiles where tiles differ in cost.

The producer's warps fill a stage of shared memory (gathered rows by cp.async, what is contiguous by
bulk copy) and run ahead over tile borders; two warpgroups of consumers multiply it, 64 rows of the
tile each. `full` and `empty` hold one mbarrier a stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton.gemm import ROWS_BOUND, in_groups

CONSUMERS = gl.constexpr(2)


@gluon.jit
def tile_of(t, num_m, tiles_ptr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr):
    """Expert, first row and column tile of work item t; of an item past the end, expert 0."""
    m, jn = in_groups(t, num_m, N_TILES, GROUP_M)
    exists = t < num_m * N_TILES
    e = gl.load(tiles_ptr + 2 * m, mask=exists, other=0)
    return e, gl.load(tiles_ptr + 2 * m + 1, mask=exists, other=0), jn


@gluon.jit
def rows_of(t, num_m, tiles_ptr, offsets_ptr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr):
    """What `tile_of` says of work item t, and the row past the expert's last."""
    e, row0, jn = tile_of(t, num_m, tiles_ptr, N_TILES, GROUP_M)
    return e, row0, jn, gl.load(offsets_ptr + e + 1)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and its parity."""
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, GATHERING_WARPS: gl.constexpr):
    """(full, empty), the barriers of every stage.

    A stage is full once the bulk copies' bytes and the copies of every thread of the warps that
    gather have arrived, and empty once both consumers have let go of it.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1 + 32 * GATHERING_WARPS)
        mbarrier.init(empty.index(s), count=CONSUMERS)
    return full, empty


@gluon.jit
def copy_rows(buffer, pointers, exists, barrier):
    """Start copying one tile through per-element pointers; arrive when it is there.

    Rows that do not exist become zeros.
    """
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=exists)
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def gather_rows(
    x_ptr, w_desc, perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr, num_experts,
    x_bufs, w_bufs, full, empty,
    N: gl.constexpr, K: gl.constexpr, TOP_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_TILES: gl.constexpr, GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
    WARPS: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """The producer of a GEMM over gathered rows: fills the ring, tile after tile.

    x (T, K) is gathered through perm, LANES threads sharing a row of a step. w_desc: (E*N, K), or
    TRANSPOSED (E*K, N), BLOCK_N columns of the product a tile; or (2E, N/2, K) in boxes of BLOCK_N
    columns of both halves of an expert.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
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
        pointers = gl.expand_dims(x_ptr + token.to(gl.int64) * K, 1) + cols
        slots = gl.load(perm_ptr + next_row0 + i, mask=next_row0 + i < total, other=0)
        after = t + 2 * PROGRAMS
        after_e, after_row0, after_jn = tile_of(after, num_m, tiles_ptr, N_TILES, GROUP_M)
        for k0 in range(0, K, BLOCK_K):
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(barrier, w_desc.block_type.nbytes)
            if len(w_desc.block_type.shape) == 3:
                at = [2 * e, jn * BLOCK_N, k0]
            elif TRANSPOSED:
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
def first_sums(
    bias_ptr, e, column, N: gl.constexpr, HAS_BIAS: gl.constexpr, ROWS: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """What the sums of a tile start from: the bias (E, N) of its columns, or zero."""
    acc = gl.zeros((ROWS, column.shape[0]), gl.float32, layout)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + e.to(gl.int64) * N + column, mask=column < N, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 0)
    return acc


@gluon.jit
def multiply_stage(a, b, acc, empty, stage, phase, first, STAGES: gl.constexpr):
    """Adds a b of a stage that is full; lets go of the stage before, unless this is the first.

    Returns acc, still in flight, and the next stage and its parity.
    """
    acc = warpgroup_mma(a, b, acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=not first)
    stage, phase = advance(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def multiply_tile(
    acc, x_bufs, w_bufs, full, empty, stage, phase,
    K: gl.constexpr, TRANSPOSED: gl.constexpr, GATHERED: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Adds to acc the products of this consumer's rows of a tile of depth K; lets go of its stages.

    GATHERED rows were written by cp.async. Returns acc and the next stage and its parity.
    """
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    for k0 in range(0, K, BLOCK_K):
        mbarrier.wait(full.index(stage), phase)
        if GATHERED:
            fence_async_shared()  # cp.async wrote the rows, wgmma reads by the other proxy
        x_k = x_bufs.index(stage).reshape((CONSUMERS * ROWS, BLOCK_K)).slice(GROUP * ROWS, ROWS, 0)
        if TRANSPOSED:
            w_k = w_bufs.index(stage)
        else:
            w_k = w_bufs.index(stage).reshape((COLUMNS, BLOCK_K)).permute((1, 0))
        acc, stage, phase = multiply_stage(x_k, w_k, acc, empty, stage, phase, k0 == 0, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before(stage, STAGES)), count=1)
    return acc, stage, phase


@gluon.jit
def pass_stages(
    full, empty, stage, phase, K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr
):
    """Lets go of the stages of a tile of depth K unread; returns the next stage and its parity."""
    for _ in range(0, K, BLOCK_K):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def halves(tile):
    """The left and the right columns of a tile of sums, a renaming of registers."""
    COLUMNS: gl.constexpr = tile.shape[1] // 2
    return tile.reshape((tile.shape[0], 2, COLUMNS)).permute((0, 2, 1)).split()


@gluon.jit
def put_rows(desc, buffer, tile, row0, end, col0):
    """Send a tile on its way to its rows and columns, by a copy that ends at row `end`.

    Waits first until what the buffer held has left it. desc: `ragged`, in blocks of the tile.
    """
    tma.store_wait(0)
    buffer.reshape(desc.block_type.shape[2:]).store(tile.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [ROWS_BOUND, end, ROWS_BOUND - end + row0, col0], buffer)


@gluon.jit
def make_queue():
    """(tiles, depths, posted, taken): two places, each a tile's number and its depth in rows."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = gl.allocate_shared_memory(gl.int32, [2, 1], layout)
    depths = gl.allocate_shared_memory(gl.int32, [2, 1], layout)
    posted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(posted.index(place), count=1)
        mbarrier.init(taken.index(place), count=CONSUMERS)
    return tiles, depths, posted, taken


@gluon.jit
def draw(next_ptr, WARPS: gl.constexpr):
    """Start to draw the next number that no program has drawn; `drawn` waits for it.

    It orders no other access, so it is relaxed: a fence would wait for the copies in flight.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane = gl.arange(0, 32 * WARPS, layout)
    one = gl.full([32 * WARPS], 1, gl.int32, layout)
    return gl.atomic_add(next_ptr + lane, one, mask=lane == 0, sem="relaxed")


@gluon.jit
def drawn(ticket, WARPS: gl.constexpr):
    """The number that `draw` drew."""
    lane = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    return gl.max(gl.where(lane == 0, ticket, 0), 0)


@gluon.jit
def post(tiles, depths, posted, taken, turn, t, depth, WARPS: gl.constexpr):
    """The producer tells its consumers a tile and its depth; `turn` counts the calls from 0."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    place = turn % 2
    mbarrier.wait(taken.index(place), (turn // 2 + 1) % 2)
    tiles.index(place).store(gl.full([1], t, gl.int32, layout))
    depths.index(place).store(gl.full([1], depth, gl.int32, layout))
    mbarrier.arrive(posted.index(place), count=1)


@gluon.jit
def take(tiles, depths, posted, taken, turn):
    """What the producer posted at this turn; called by warpgroups of four warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = turn % 2
    mbarrier.wait(posted.index(place), (turn // 2) % 2)
    t = gl.max(tiles.index(place).load(layout), 0)
    depth = gl.max(depths.index(place).load(layout), 0)
    mbarrier.arrive(taken.index(place), count=1)
    return t, depth
