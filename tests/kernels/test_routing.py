"""The routing against values written by hand, and against a plain sort on random problems."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmoe
from fastmoe import tuning
from fastmoe.routing import max_tiles
from tests.kernels.common import DEVICE

BLOCK_M = 16 if fastmoe.backend_name(torch.empty(0, device=DEVICE)) == "triton" else 0


def route(ids, num_experts, block_m=BLOCK_M):
    return fastmoe.route(torch.tensor(ids, device=DEVICE), num_experts, block_m)


def test_two_tokens_by_hand():
    r = route([[1, 0], [1, 2]], 3)
    assert r.perm.tolist() == [1, 0, 2, 3]
    assert r.inv_perm.tolist() == [1, 0, 2, 3]
    assert r.offsets.tolist() == [0, 1, 3, 4]
    assert r.num_experts == 3 and r.top_k == 2


def test_sentinels_get_no_row():
    r = route([[1, 0], [1, 2]], 2)
    assert r.offsets.tolist() == [0, 1, 3]
    assert r.inv_perm.tolist() == [1, 0, 2, -1]
    assert r.perm[:3].tolist() == [1, 0, 2]


def test_negative_ids_are_sentinels_too():
    assert route([[-1, 0]], 1).inv_perm.tolist() == [-1, 0]


def test_ties_keep_slot_order():
    assert route([[0], [0], [0]], 2).perm.tolist() == [0, 1, 2]


def test_no_tokens():
    r = fastmoe.route(torch.empty(0, 4, dtype=torch.int64, device=DEVICE), 3, BLOCK_M)
    assert r.offsets.tolist() == [0, 0, 0, 0] and r.perm.numel() == 0


@pytest.mark.skipif(not BLOCK_M, reason="the tile map is built for the Triton kernels only")
def test_tile_map_by_hand():
    # expert 0: 17 rows (two tiles), expert 1: none, expert 2: 3 rows
    r = route([[0]] * 17 + [[2]] * 3, 3, 16)
    assert r.num_tiles.item() == 3
    assert r.tiles[:3].tolist() == [[0, 0], [0, 16], [2, 17]]


def test_max_tiles_by_hand():
    # 20 slots over 3 experts in tiles of 16: one full tile, at most one partial tile for each
    # expert
    assert max_tiles(20, 3, 16) == 1 + 3
    assert max_tiles(2, 100, 16) == 0 + 2


@pytest.mark.skipif(not BLOCK_M, reason="chunks are the Triton kernels'")
@pytest.mark.parametrize("tokens", [300, 512, 513, 700])
def test_chunks_grow_where_there_would_be_too_many(tokens, monkeypatch):
    ids = torch.randint(0, 9, (tokens, 3), generator=torch.Generator().manual_seed(0))
    usual = fastmoe.route(ids.to(DEVICE), 7, BLOCK_M)  # ids 7 and 8 are elsewhere
    from fastmoe.backends.triton import routing

    monkeypatch.setattr(routing, "_MOST_CHUNKS", 2)
    few = fastmoe.route(ids.to(DEVICE), 7, BLOCK_M)
    rows = int(usual.offsets[-1])
    assert few.perm[:rows].equal(usual.perm[:rows]) and few.inv_perm.equal(usual.inv_perm)
    assert few.offsets.equal(usual.offsets) and few.num_tiles.equal(usual.num_tiles)
    assert few.tiles[: int(few.num_tiles)].equal(usual.tiles[: int(few.num_tiles)])
    assert few.inv_perm.ge(0).sum() == rows


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 300), top_k=st.integers(1, 16),
    experts=st.integers(1, 70), off_rank=st.integers(0, 40),
    seed=st.integers(0, 2**31), long=st.booleans(),
)  # fmt: skip
def test_random_routing_is_a_stable_sort(tokens, top_k, experts, off_rank, seed, long):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts + off_rank, (tokens, top_k), generator=gen, dtype=torch.int64)
    r = fastmoe.route((ids if long else ids.int()).to(DEVICE), experts, BLOCK_M)
    flat = ids.flatten().clamp(max=experts)
    order = torch.sort(flat, stable=True).indices
    rows = int((flat < experts).sum())
    assert r.offsets.tolist() == [int((flat < e).sum()) for e in range(experts + 1)]
    assert r.perm[:rows].tolist() == order[:rows].tolist()
    expected = torch.full((tokens * top_k,), -1)
    expected[order[:rows]] = torch.arange(rows)
    assert r.inv_perm.tolist() == expected.tolist()
    if BLOCK_M and rows:
        tiles = r.tiles[: r.num_tiles.item()].tolist()
        starts = r.offsets.tolist()
        assert tiles == [
            [e, row] for e in range(experts) for row in range(starts[e], starts[e + 1], BLOCK_M)
        ]


def test_buckets_by_hand():
    # 16384 tokens of 8 slots over 128 experts are 1024 rows each; one token of 8 is one row each
    assert tuning.bucket(16384 * 8, 128) == 128
    assert tuning.bucket(8, 128) == 16
    assert tuning.bucket(33 * 4, 4) == 64


def test_rows_that_the_caller_counted_are_all_there_is():
    r = route([[1, 0], [9, 2]], 3).cut(3)
    assert r.perm.tolist() == [1, 0, 3] and r.inv_perm.tolist() == [1, 0, -1, 2]
    assert r.offsets.tolist() == [0, 1, 2, 3]
