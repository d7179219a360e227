"""A counting sort of the slots by expert in two launches, without atomics whose order could show:
count each chunk's slots per expert, then place them. One launch where there is one chunk.

Shapes: ids (S,) by slot; counts (chunks, BLOCK_E) slots of each chunk per expert, sentinels left
out. A chunk is `per` slots, a multiple of CHUNK that grows with S: every program
of the second launch adds up the counts of all chunks.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from .. import CHUNK
from ..launch import launch, next_power_of_2

_STEP = 128  # slots ranked against each other at once, by comparing all pairs
_MIN_BLOCK_E = 16
_MOST_CHUNKS = 256
_COUNTS = 4096  # that a program reads at once: those of some chunks


@triton.jit
def _load_experts(ids_ptr, slots, S, NUM_EXPERTS):
    """Expert of each slot, and whether it has one: not a sentinel's, nor a slot past the end."""
    ids = tl.load(ids_ptr + slots, mask=slots < S, other=-1)
    real = (ids >= 0) & (ids < NUM_EXPERTS)
    return tl.where(real, ids, 0).to(tl.int32), real


@triton.jit(do_not_specialize=["S", "per"])
def count_kernel(
    ids_ptr, counts_ptr, S, per, NUM_EXPERTS, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    chunk = tl.program_id(0)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for s0 in range(chunk * per, (chunk + 1) * per, CHUNK):
        experts, real = _load_experts(ids_ptr, s0 + tl.arange(0, CHUNK), S, NUM_EXPERTS)
        counts += tl.histogram(experts, BLOCK_E, mask=real)
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["S", "per", "num_chunks", "MAX_TILES"])
def place_kernel(
    ids_ptr, counts_ptr, perm_ptr, inv_perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    S, per, num_chunks, MAX_TILES, NUM_EXPERTS, COUNTED: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Every chunk's slots to their rows, in order, and its share of the tile map.

    Without counts, not `COUNTED`, one program places all slots.
    """
    chunk = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    if COUNTED:
        of_all = tl.zeros((ROWS, BLOCK_E), tl.int32)
        of_earlier = tl.zeros((ROWS, BLOCK_E), tl.int32)  # chunks before this one
        for c0 in range(0, num_chunks, ROWS):
            c = c0 + tl.arange(0, ROWS)
            at = counts_ptr + c[:, None] * BLOCK_E + e[None, :]
            counts = tl.load(at, mask=(c < num_chunks)[:, None], other=0)
            of_all += counts
            of_earlier += tl.where((c < chunk)[:, None], counts, 0)
        total = tl.sum(of_all, 0)
        before = tl.sum(of_earlier, 0)
    else:
        every, exist = _load_experts(ids_ptr, tl.arange(0, CHUNK), S, NUM_EXPERTS)
        total = tl.histogram(every, BLOCK_E, mask=exist)
        before = tl.zeros((BLOCK_E,), tl.int32)
    offsets = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(offsets_ptr + e, offsets, mask=e < NUM_EXPERTS)
        tl.store(offsets_ptr + NUM_EXPERTS, tl.sum(total, 0))

    next_row = offsets + before
    for s0 in range(chunk * per, tl.minimum((chunk + 1) * per, S), STEP):
        slots = s0 + tl.arange(0, STEP)
        experts, real = _load_experts(ids_ptr, slots, S, NUM_EXPERTS)
        i = tl.arange(0, STEP)
        earlier = (experts[:, None] == experts[None, :]) & (i[None, :] < i[:, None]) & real[None, :]
        row = tl.gather(next_row, experts, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(perm_ptr + row, slots, mask=real)
        tl.store(inv_perm_ptr + slots, tl.where(real, row, -1), mask=slots < S)
        next_row += tl.histogram(experts, BLOCK_E, mask=real)

    tiles = (total + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    if chunk == 0:
        tl.store(num_tiles_ptr, num_tiles)
    for m0 in range(chunk * 16, MAX_TILES, num_chunks * 16):
        m = m0 + tl.arange(0, 16)
        owner = tl.sum((last[None, :] <= m[:, None]).to(tl.int32), 1)
        owner = tl.minimum(owner, BLOCK_E - 1)
        row = tl.gather(offsets, owner, 0) + (m - tl.gather(last - tiles, owner, 0)) * BLOCK_M
        tl.store(tiles_ptr + 2 * m, owner, mask=m < num_tiles)
        tl.store(tiles_ptr + 2 * m + 1, row, mask=m < num_tiles)


def route_slots(ids: torch.Tensor, num_experts: int, block_m: int, max_tiles: int):
    """perm, inv_perm, offsets, tiles and num_tiles from the ids (S,) of the slots, S > 0."""
    num_slots = ids.numel()
    per = CHUNK * -(-num_slots // (CHUNK * _MOST_CHUNKS))
    num_chunks = -(-num_slots // per)
    block_e = max(_MIN_BLOCK_E, next_power_of_2(num_experts))
    empty = partial(torch.empty, dtype=torch.int32, device=ids.device)
    perm, inv_perm, offsets = empty(num_slots), empty(num_slots), empty(num_experts + 1)
    tiles, num_tiles = empty(max_tiles, 2), empty(1)
    counts = None
    if num_chunks > 1:
        counts = empty(num_chunks, block_e)
        kind = (num_experts, CHUNK, block_e)
        launch(count_kernel, (num_chunks,), (ids, counts), (num_slots, per), kind)
    launch(
        place_kernel, (num_chunks,), (ids, counts, perm, inv_perm, offsets, tiles, num_tiles),
        (num_slots, per, num_chunks, max_tiles),
        (num_experts, counts is not None, max(_COUNTS // block_e, 1), CHUNK, block_e, block_m,
         _STEP),
    )  # fmt: skip
    return perm, inv_perm, offsets, tiles, num_tiles
