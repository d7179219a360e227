"""What the warp-specialised kernels share: a ring of stages between one producer and two consumers,
and a queue of tiles where tiles differ in cost.

The producer's warps fill a stage of shared memory (gathered rows by cp.async, what is contiguous by
bulk copy) and run ahead over tile borders; two warpgroups of consumers multiply it, 64 rows of the
tile each. `full` and `empty` hold one mbarrier a stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

CONSUMERS = gl.constexpr(2)


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
def make_queue():
    """(items, posted, taken): two places for the numbers of tiles that the producer draws."""
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(posted.index(place), count=1)
        mbarrier.init(taken.index(place), count=CONSUMERS)
    return items, posted, taken


@gluon.jit
def draw(next_ptr, items, posted, taken, turn, WARPS: gl.constexpr):
    """The producer's next tile: the next number that no program has drawn, told to its consumers.

    `turn` counts the calls from 0.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    t = gl.atomic_add(next_ptr, 1)
    place = turn % 2
    mbarrier.wait(taken.index(place), (turn // 2 + 1) % 2)
    items.index(place).store(gl.full([1], t, gl.int32, layout))
    mbarrier.arrive(posted.index(place), count=1)
    return t


@gluon.jit
def take(items, posted, taken, turn):
    """The tile that the producer drew at this turn; called by warpgroups of four warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = turn % 2
    mbarrier.wait(posted.index(place), (turn // 2) % 2)
    t = gl.max(items.index(place).load(layout), 0)
    mbarrier.arrive(taken.index(place), count=1)
    return t
