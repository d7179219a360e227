"""A counting sort of the slots by expert in three launches, without atomics whose order could show:
count each chunk's slots per expert, add the counts up along the chunks, place the slots.

Shapes: ids (S,) by slot; counts (chunks + 1, BLOCK_E) slots of each chunk per expert, then those of
all chunks before it, then, in the last row, all; column E counts the sentinels.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch

_CHUNK = 256  # slots of one program
_STEP = 128  # slots ranked against each other at once, by comparing all pairs
_SCAN_ROWS, _SCAN_COLUMNS = 128, 16  # the block of counts that one program adds up at a time


@triton.jit
def _load_experts(ids_ptr, slots, S, NUM_EXPERTS):
    """Expert of each slot; NUM_EXPERTS for sentinels and for slots past the end."""
    ids = tl.load(ids_ptr + slots, mask=slots < S, other=-1)
    return tl.where((ids >= 0) & (ids < NUM_EXPERTS), ids, NUM_EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=["S"])
def count_kernel(ids_ptr, counts_ptr, S, NUM_EXPERTS, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    chunk = tl.program_id(0)
    experts = _load_experts(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), S, NUM_EXPERTS)
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), tl.histogram(experts, BLOCK_E))


@triton.jit(do_not_specialize=["num_chunks"])
def scan_kernel(
    counts_ptr, num_chunks, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """In place, per expert: the counts of the chunks before each chunk, and their total."""
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for c0 in range(0, num_chunks, ROWS):
        c = c0 + tl.arange(0, ROWS)
        at = counts_ptr + c[:, None] * BLOCK_E + e[None, :]
        counts = tl.load(at, mask=(c < num_chunks)[:, None], other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + total[None, :], mask=(c < num_chunks)[:, None])
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + num_chunks * BLOCK_E + e, total)


@triton.jit(do_not_specialize=["S", "num_chunks", "MAX_TILES"])
def place_kernel(
    ids_ptr, counts_ptr, perm_ptr, inv_perm_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
    S, num_chunks, MAX_TILES, NUM_EXPERTS,
    CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Every chunk's slots to their rows, in order, and its share of the tile map."""
    chunk = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    before = tl.load(counts_ptr + chunk * BLOCK_E + e)
    total = tl.load(counts_ptr + num_chunks * BLOCK_E + e)
    total = tl.where(e < NUM_EXPERTS, total, 0)
    offsets = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(offsets_ptr + e, offsets, mask=e <= NUM_EXPERTS)

    next_row = offsets + before
    for s0 in range(0, CHUNK, STEP):
        slots = chunk * CHUNK + s0 + tl.arange(0, STEP)
        experts = _load_experts(ids_ptr, slots, S, NUM_EXPERTS)
        i = tl.arange(0, STEP)
        earlier = (experts[:, None] == experts[None, :]) & (i[None, :] < i[:, None])
        row = tl.gather(next_row, experts, 0) + tl.sum(earlier.to(tl.int32), 1)
        real = experts < NUM_EXPERTS
        tl.store(perm_ptr + row, slots, mask=real)
        tl.store(inv_perm_ptr + slots, tl.where(real, row, -1), mask=slots < S)
        next_row += tl.histogram(experts, BLOCK_E)

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
    num_chunks = triton.cdiv(num_slots, _CHUNK)
    block_e = max(_SCAN_COLUMNS, triton.next_power_of_2(num_experts + 1))
    empty = lambda *shape: torch.empty(shape, dtype=torch.int32, device=ids.device)  # noqa: E731
    counts, perm, inv_perm = empty(num_chunks + 1, block_e), empty(num_slots), empty(num_slots)
    offsets, tiles, num_tiles = empty(num_experts + 1), empty(max_tiles, 2), empty(1)
    chunks = (num_chunks,)
    launch(count_kernel, chunks, (ids, counts), (num_slots,), (num_experts, _CHUNK, block_e))
    launch(
        scan_kernel, (block_e // _SCAN_COLUMNS,), (counts,), chunks,
        (block_e, _SCAN_ROWS, _SCAN_COLUMNS),
    )  # fmt: skip
    launch(
        place_kernel, chunks, (ids, counts, perm, inv_perm, offsets, tiles, num_tiles),
        (num_slots, num_chunks, max_tiles), (num_experts, _CHUNK, block_e, block_m, _STEP),
    )  # fmt: skip
    return perm, inv_perm, offsets, tiles, num_tiles
