"""Index arithmetic of the exchanges, on one process, with expected values written by hand."""

import pytest
import torch

from hf_moe_ep.expert_parallel.exchange import (
    _localise,
    _pack,
    _padded,
    _rank_major,
    _unpack,
    _wanted,
)

YES, NO = True, False


def tensor(*rows, **kwargs):
    return torch.tensor(rows, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wanted(dtype):
    # two experts a rank, three ranks; 6 and more are sentinels, on no rank
    ids = tensor([0, 1], [1, 4], [5, 2], [6, 3], [9, 2**31 - 1], dtype=dtype)
    want = tensor(
        [YES, NO, NO],  # both experts of rank 0: wanted there once
        [YES, NO, YES],
        [NO, YES, YES],
        [NO, YES, NO],
        [NO, NO, NO],
    )
    assert torch.equal(_wanted(ids, experts=2, n=3), want)


def test_wanted_without_tokens():
    assert _wanted(torch.zeros(0, 2, dtype=torch.int64), experts=2, n=3).shape == (0, 3)


def test_rank_major():
    wanted = tensor([YES, YES, NO], [NO, YES, NO], [YES, NO, NO], [NO, NO, NO])
    tokens, positions = _rank_major(wanted, 4)
    assert tokens.tolist() == [0, 2, 0, 1]  # rank 0 gets tokens 0 and 2, rank 1 tokens 0 and 1
    assert positions.tolist() == [[0, 2, -1], [-1, 3, -1], [1, -1, -1], [-1, -1, -1]]


def test_rank_major_of_nothing():
    tokens, positions = _rank_major(tensor([NO, NO], [NO, NO]), 0)
    assert tokens.tolist() == [] and positions.tolist() == [[-1, -1], [-1, -1]]
    tokens, positions = _rank_major(torch.zeros(0, 2, dtype=torch.bool), 0)
    assert tokens.shape == (0,) and positions.shape == (0, 2)


def test_pack():
    packed = _pack(tensor([3, 1], [7, 0]), tensor([1.0, -0.0], [0.5, 2.0]))
    # 1.0 is 0x3F800000 in fp32, and so on
    want = tensor([3, 1, 0x3F800000, -(2**31)], [7, 0, 0x3F000000, 0x40000000], dtype=torch.int32)
    assert packed.dtype == torch.int32 and torch.equal(packed, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_unpack_gives_back_every_bit(dtype, id_dtype):
    ids = torch.randint(0, 2**31 - 1, (5, 3)).to(id_dtype)
    weights = torch.randn(5, 3, dtype=torch.float64).to(dtype)
    weights[0, 0], weights[1, 1], weights[2, 2] = float("inf"), 0.0, torch.finfo(dtype).tiny
    got_ids, got_weights = _unpack(_pack(ids, weights), dtype)
    assert got_ids.dtype == torch.int32 and torch.equal(got_ids, ids.int())
    assert got_weights.dtype == dtype and torch.equal(got_weights, weights)


def test_localise():
    ids = tensor([0, 4], [3, 5], [2, 1], [6, 2**31 - 1], dtype=torch.int32)
    weights = tensor([0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, float("nan")])
    local, scaled = _localise(ids, weights, rank=1, experts=2)  # rank 1 holds experts 2 and 3
    assert local.tolist() == [[2, 2], [1, 2], [0, 2], [2, 2]]  # 2 is the sentinel
    want = tensor([0.0, 0.0], [0.3, 0.0], [0.5, 0.0], [0.0, 0.0])
    assert torch.equal(scaled, want)  # NaN elsewhere stays elsewhere


def test_padded():
    t = tensor([1, 2], [3, 4])
    assert _padded(t, 3, 9).tolist() == [[1, 2], [3, 4], [9, 9]]
    assert _padded(t, 2, 9) is t
    assert _padded(t[:0], 1, 9).tolist() == [[9, 9]]
