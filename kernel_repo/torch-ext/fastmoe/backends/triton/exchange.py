"""Rows read from other GPUs' memory, one program a row; bound by the link.

Shapes: as in the host file. A buffer's address on a rank is an integer in peers_ptr.
"""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)  # the id of an expert on no rank


@triton.jit
def _published(peers_ptr, rank, offset, LIKE):
    """A pointer of the type of LIKE to what `rank` published at `offset` bytes.

    Aligned to 16 bytes, as buffers and arrays in them are: loads of a single element otherwise.
    """
    address = tl.load(peers_ptr + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(LIKE.dtype.element_ty)), 16)


@triton.jit(do_not_specialize=["S", "WRITTEN"])
def write_routes_kernel(
    out_ptr, ids_ptr, weights_ptr, S, WRITTEN, TOP_K: tl.constexpr, BLOCK_S: tl.constexpr
):
    """A token's ids and the bits of its weights; slots from WRITTEN on are for no expert."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = slots < WRITTEN
    ids = tl.load(ids_ptr + slots, mask=exists, other=NOWHERE).to(tl.int32)
    weights = tl.load(weights_ptr + slots, mask=exists, other=0.0).to(tl.float32)
    at = out_ptr + (slots // TOP_K).to(tl.int64) * (2 * TOP_K) + slots % TOP_K
    tl.store(at, ids, mask=slots < S)
    tl.store(at + TOP_K, weights.to(tl.int32, bitcast=True), mask=slots < S)


@triton.jit(do_not_specialize=["S", "T", "FIRST"])
def pull_routes_kernel(
    peers_ptr, ids_ptr, weights_ptr, S, T, FIRST, NUM_EXPERTS,
    TOP_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Local ids, or the sentinel NUM_EXPERTS with weight 0, and weights of all slots."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = slots < S
    row, k = slots // TOP_K, slots % TOP_K
    address = tl.load(peers_ptr + row // T, mask=inside, other=0)
    at = address.to(tl.pointer_type(tl.int32)) + (row % T).to(tl.int64) * (2 * TOP_K) + k
    local = tl.load(at, mask=inside, other=0) - FIRST
    weight = tl.load(at + TOP_K, mask=inside, other=0).to(tl.float32, bitcast=True)
    here = (local >= 0) & (local < NUM_EXPERTS)
    tl.store(ids_ptr + slots, tl.where(here, local, NUM_EXPERTS), mask=inside)
    weight = tl.where(here, weight, 0.0).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + slots, weight, mask=inside)


@triton.jit(do_not_specialize=["T"])
def pull_rows_kernel(
    peers_ptr, ids_ptr, out_ptr, T, H, NUM_EXPERTS,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row % T] of rank row // T, where the row has an expert here.

    The ranks take turns, so that the rows at home are copied while the link carries the others.
    """
    ranks = tl.num_programs(0) // T
    row = tl.program_id(0) % ranks * T + tl.program_id(0) // ranks
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row.to(tl.int64) * TOP_K + k, mask=k < TOP_K, other=NUM_EXPERTS)
    if tl.min(ids, 0) < NUM_EXPERTS:
        source = _published(peers_ptr, row // T, 0, out_ptr) + (row % T).to(tl.int64) * H
        for h0 in range(0, H, BLOCK_H):
            cols = h0 + tl.arange(0, BLOCK_H)
            value = tl.load(source + cols, mask=cols < H)
            tl.store(out_ptr + row.to(tl.int64) * H + cols, value, mask=cols < H)


@triton.jit
def _sum_of_ranks(
    peers_ptr, offset, owners, out_ptr, row, t, W, NUM_RANKS: tl.constexpr, BLOCK_W: tl.constexpr
):
    """out[t] = sum over the ranks that are owners, in order and in fp32, of their row."""
    for w0 in range(0, W, BLOCK_W):
        cols = w0 + tl.arange(0, BLOCK_W)
        acc = tl.zeros((BLOCK_W,), tl.float32)
        for r in tl.static_range(NUM_RANKS):
            asked = tl.max((owners == r).to(tl.int32), 0) > 0
            source = _published(peers_ptr, r, offset, out_ptr) + row.to(tl.int64) * W
            part = tl.load(source + cols, mask=(cols < W) & asked, other=0.0)
            acc += part.to(tl.float32)
        value = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t.to(tl.int64) * W + cols, value, mask=cols < W)


@triton.jit(do_not_specialize=["first", "second", "FIRST_ROW"])
def pull_sums_kernel(
    peers_ptr, ids_ptr, out_ptr, small_ptr, first, second, FIRST_ROW, H, SMALL, NUM_EXPERTS,
    TOP_K: tl.constexpr, NUM_RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_SMALL: tl.constexpr,
):  # fmt: skip
    """Sums of token t's rows of width H published at byte `first`, and, unless BLOCK_SMALL is 0, of
    width SMALL at byte `second`: in one launch, because the host often is what a step waits for.
    """
    t = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + t.to(tl.int64) * TOP_K + k, mask=k < TOP_K, other=-1)
    owners = tl.where(ids >= 0, ids // NUM_EXPERTS, NUM_RANKS)  # sentinels, too, are on no rank
    _sum_of_ranks(peers_ptr, first, owners, out_ptr, FIRST_ROW + t, t, H, NUM_RANKS, BLOCK_H)
    if BLOCK_SMALL:
        _sum_of_ranks(
            peers_ptr, second, owners, small_ptr, FIRST_ROW + t, t, SMALL, NUM_RANKS, BLOCK_SMALL
        )
