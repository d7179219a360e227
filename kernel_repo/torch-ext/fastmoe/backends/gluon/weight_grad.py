"""The weight gradient over gathered rows: per expert a GEMM whose depth is data.

Shapes: p (S, P) sorted by expert, q (T, Q) gathered through perm, out (E, P, Q) or transposed
(E, Q, P), written by bulk copies, which leave out what lies past P or Q, as those that read p do
with rows past the expert's last.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ..triton.gemm import ROWS_BOUND, in_groups
from .pipeline import (
    advance,
    before,
    copy_rows,
    draw,
    drawn,
    halves,
    make_barriers,
    make_queue,
    multiply_stage,
    post,
    take,
)

PRODUCER_WARPS = gl.constexpr(4)
GROUP_P = gl.constexpr(8)


@gluon.jit
def _tile(
    t, P_TILES: gl.constexpr, Q_TILES: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """Expert, first column of p and of q of work item t."""
    ip, iq = in_groups(t % (P_TILES * Q_TILES), P_TILES, Q_TILES, GROUP_P)
    return t // (P_TILES * Q_TILES), ip * BLOCK_P, iq * BLOCK_Q


@gluon.jit
def _bounds(t, offsets_ptr, num_experts, TILES: gl.constexpr):
    """The first row of work item t's expert and the row past its last; of none past the end."""
    e = t // TILES
    exists = e < num_experts
    lo = gl.load(offsets_ptr + e, mask=exists, other=0)
    return lo, gl.load(offsets_ptr + e + 1, mask=exists, other=0)


@gluon.jit
def _produce(
    p_desc, q_ptr, perm_ptr, offsets_ptr, next_ptr, num_experts, p_bufs, q_bufs,
    full, empty, tiles, depths, posted, taken,
    P: gl.constexpr, Q: gl.constexpr, TOP_K: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    P_TILES: gl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    Q_TILES: gl.constexpr = (Q + BLOCK_Q - 1) // BLOCK_Q
    TILES: gl.constexpr = P_TILES * Q_TILES
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [PRODUCER_WARPS, 1], [1, 0])
    j = gl.arange(0, BLOCK_K, gl.SliceLayout(1, layout))
    cols = gl.expand_dims(gl.arange(0, BLOCK_Q, gl.SliceLayout(0, layout)), 0)
    stage = 0
    phase = 0
    turn = 0
    # A tile's number is drawn two tiles ahead, its bounds are read one tile ahead, and the slots of
    # its first rows during the last step before it.
    t = drawn(draw(next_ptr, PRODUCER_WARPS), PRODUCER_WARPS)
    ticket = draw(next_ptr, PRODUCER_WARPS)
    lo, hi = _bounds(t, offsets_ptr, num_experts, TILES)
    slots = gl.load(perm_ptr + lo + j, mask=lo + j < hi, other=0)
    while t < num_experts * TILES:
        post(tiles, depths, posted, taken, turn, t, hi - lo, PRODUCER_WARPS)
        e, p0, q0 = _tile(t, P_TILES, Q_TILES, BLOCK_P, BLOCK_Q)
        t = drawn(ticket, PRODUCER_WARPS)
        ticket = draw(next_ptr, PRODUCER_WARPS)
        next_lo, next_hi = _bounds(t, offsets_ptr, num_experts, TILES)
        for k0 in range(lo, hi, BLOCK_K):
            exists = gl.expand_dims(k0 + j < hi, 1)
            if Q % BLOCK_Q != 0:
                exists = exists & (q0 + cols < Q)
            pointers = gl.expand_dims(q_ptr + (slots // TOP_K).to(gl.int64) * Q + q0, 1) + cols
            last = k0 + BLOCK_K >= hi
            following = gl.where(last, next_lo, k0 + BLOCK_K) + j
            slots = gl.load(
                perm_ptr + following, mask=following < gl.where(last, next_hi, hi), other=0
            )
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(barrier, p_desc.block_type.nbytes)
            at = [ROWS_BOUND, hi, ROWS_BOUND - hi + k0, p0]
            tma.async_copy_global_to_shared(p_desc, at, barrier, p_bufs.index(stage))
            copy_rows(q_bufs.index(stage), pointers, exists, barrier)
            stage, phase = advance(stage, phase, STAGES)
        if lo == hi:
            slots = gl.load(perm_ptr + next_lo + j, mask=next_lo + j < next_hi, other=0)
        lo = next_lo
        hi = next_hi
        turn += 1
    post(tiles, depths, posted, taken, turn, t, 0, PRODUCER_WARPS)


@builtin
def _add_shared_to_global(desc, coord, source, _semantic=None):
    """tma.async_copy_shared_to_global that adds to what is there; Gluon 3.6 gives it no name."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, source.handle
    )


@gluon.jit
def _write(out_desc, out, acc, e, p0, q0, TRANSPOSE: gl.constexpr, ADD: gl.constexpr):
    """A tile, q by p, through the store buffer `out`, which holds half of one."""
    left, right = halves(acc)
    _write_part(out_desc, out, left, e, p0, q0, TRANSPOSE, ADD)
    _write_part(out_desc, out, right, e, p0 + acc.shape[1] // 2, q0, TRANSPOSE, ADD)


@gluon.jit
def _write_part(out_desc, out, acc, e, p0, q0, TRANSPOSE: gl.constexpr, ADD: gl.constexpr):
    tma.store_wait(0)
    matrix = out.reshape(out_desc.block_type.shape[1:])
    if TRANSPOSE:
        at = [e, q0, p0]
        matrix.store(acc.to(out_desc.dtype))
    else:
        at = [e, p0, q0]
        matrix.permute((1, 0)).store(acc.to(out_desc.dtype))
    fence_async_shared()
    if ADD:
        _add_shared_to_global(out_desc, at, out)
    else:
        tma.async_copy_shared_to_global(out_desc, at, out)


@gluon.jit
def _consume(
    out_desc, num_experts, p_bufs, q_bufs, out, full, empty, tiles, depths, posted, taken,
    P: gl.constexpr, Q: gl.constexpr, TRANSPOSE: gl.constexpr, ADD: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    P_TILES: gl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    Q_TILES: gl.constexpr = (Q + BLOCK_Q - 1) // BLOCK_Q
    HALF: gl.constexpr = BLOCK_Q // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_P, 16])
    stage = 0
    phase = 0
    turn = 0
    t, depth = take(tiles, depths, posted, taken, turn)
    while t < num_experts * P_TILES * Q_TILES:
        e, p0, q0 = _tile(t, P_TILES, Q_TILES, BLOCK_P, BLOCK_Q)
        q0 += GROUP * HALF
        acc = gl.zeros((HALF, BLOCK_P), gl.float32, layout)
        for k0 in range(0, depth, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            fence_async_shared()  # cp.async wrote q, wgmma reads it through the other proxy
            q_k = q_bufs.index(stage).slice(GROUP * HALF, HALF, 1).permute((1, 0))
            p_k = p_bufs.index(stage).reshape((BLOCK_K, BLOCK_P))
            acc, stage, phase = multiply_stage(q_k, p_k, acc, empty, stage, phase, k0 == 0, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=depth > 0)
        if ADD:
            if depth > 0:
                _write(out_desc, out, acc, e, p0, q0, TRANSPOSE, ADD)
        else:
            _write(out_desc, out, acc, e, p0, q0, TRANSPOSE, ADD)
        turn += 1
        t, depth = take(tiles, depths, posted, taken, turn)
    tma.store_wait(0)


@gluon.jit
def weight_grad_kernel(
    p_desc, q_ptr, out_desc, perm_ptr, offsets_ptr, next_ptr, num_experts,
    P: gl.constexpr, Q: gl.constexpr, TOP_K: gl.constexpr,
    TRANSPOSE: gl.constexpr, ADD: gl.constexpr,
    BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows of e of p[row]^T q[token].

    With ADD the sum is added to out, 16-bit or fp32, by bulk copies that add: no read of out, and
    one rounding of the sum to its dtype before. An expert without rows is not touched.

    Tiles are as deep as their expert has rows, so programs draw them from a counter, next_ptr, that
    starts at 0: dealt out in turn, an expert with many rows would keep some programs long after the
    others.
    """
    dtype: gl.constexpr = p_desc.dtype
    p_bufs = gl.allocate_shared_memory(dtype, [STAGES] + p_desc.block_type.shape, p_desc.layout)
    q_layout: gl.constexpr = gl.NVMMASharedLayout(128, p_desc.layout.element_bitwidth, 2)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_Q], q_layout)
    out_bufs = gl.allocate_shared_memory(
        out_desc.dtype, [2] + out_desc.block_type.shape, out_desc.layout
    )
    full, empty = make_barriers(STAGES, PRODUCER_WARPS)
    tiles, depths, posted, taken = make_queue()
    gl.warp_specialize(
        [
            (_consume, (
                out_desc, num_experts, p_bufs, q_bufs, out_bufs.index(0), full, empty,
                tiles, depths, posted, taken, P, Q, TRANSPOSE, ADD,
                BLOCK_P, BLOCK_Q, BLOCK_K, STAGES, gl.constexpr(0),
            )),
            (_consume, (
                out_desc, num_experts, p_bufs, q_bufs, out_bufs.index(1), full, empty,
                tiles, depths, posted, taken, P, Q, TRANSPOSE, ADD,
                BLOCK_P, BLOCK_Q, BLOCK_K, STAGES, gl.constexpr(1),
            )),
            (_produce, (
                p_desc, q_ptr, perm_ptr, offsets_ptr, next_ptr, num_experts, p_bufs, q_bufs,
                full, empty, tiles, depths, posted, taken, P, Q, TOP_K,
                BLOCK_P, BLOCK_Q, BLOCK_K, STAGES,
            )),
        ],
        [4, 4],
        [208, 88],
    )  # fmt: skip
