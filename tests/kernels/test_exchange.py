"""The kernels that read peers' memory, with every rank's buffer on one device."""

import pytest
import torch

import fastmoe
from fastmoe import exchange
from tests.kernels.common import DEVICE

needs_kernels = pytest.mark.skipif(
    fastmoe.backend_name(torch.empty(0, device=DEVICE)) != "triton",
    reason="needs a GPU or Triton's interpreter",
)
RANKS, T, H, K, EXPERTS = 3, 5, 40, 3, 4  # experts of each rank


def addresses(buffers):
    return torch.tensor([b.data_ptr() for b in buffers], device=DEVICE)


def published_tokens():
    """Every rank's x (T, H), ids (T, K) and weights (T, K), and buffers [routes | x] of bytes."""
    torch.manual_seed(0)
    xs = [torch.randn(T, H).to(DEVICE) for _ in range(RANKS)]
    ids = [torch.randint(RANKS * EXPERTS, (T, K)).int().to(DEVICE) for _ in range(RANKS)]
    weights = [torch.rand(T, K).to(DEVICE) for _ in range(RANKS)]
    routes = [torch.cat([i, w.view(torch.int32)], 1) for i, w in zip(ids, weights, strict=True)]
    buffers = [
        torch.cat([r.view(torch.uint8).flatten(), x.view(torch.uint8).flatten()])
        for r, x in zip(routes, xs, strict=True)
    ]
    return xs, ids, weights, buffers


@needs_kernels
def test_each_rank_pulls_the_rows_of_its_experts():
    xs, ids, weights, buffers = published_tokens()
    x_at = T * 2 * K * 4
    for rank in range(RANKS):
        peers, first = addresses(buffers), rank * EXPERTS
        local, pulled = exchange.pull_routes(peers, 0, T, K, first, EXPERTS)
        every = torch.cat(ids)
        here = (every >= first) & (every < first + EXPERTS)
        assert torch.equal(local, torch.where(here, every - first, EXPERTS))
        assert torch.equal(pulled, torch.where(here, torch.cat(weights), 0.0))
        rows = exchange.pull_rows(peers, x_at, local, H, EXPERTS, torch.float32)
        wanted = here.any(1)
        assert 0 < wanted.sum() < RANKS * T
        assert torch.equal(rows[wanted], torch.cat(xs)[wanted])
        assert rows[~wanted].isnan().all()  # nothing crossed the link for them


@needs_kernels
def test_partials_are_summed_in_rank_order_from_the_ranks_that_have_them():
    _, ids, _, _ = published_tokens()
    partials = [torch.randn(RANKS * T, H).to(DEVICE) for _ in range(RANKS)]
    for rank in range(RANKS):
        first = rank * T
        out = exchange.pull_sums(
            addresses(partials), 0, ids[rank], T, rank, H, EXPERTS, torch.float32
        )
        want = torch.zeros(T, H, device=DEVICE)
        for peer in range(RANKS):
            asked = (ids[rank] // EXPERTS == peer).any(1, keepdim=True)
            want += partials[peer][first : first + T] * asked
        assert torch.equal(out, want)


def test_sum_rows_by_hand():
    y = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]], device=DEVICE)
    positions = torch.tensor([[0, 2], [-1, 1], [-1, -1]], device=DEVICE)
    out = fastmoe.sum_rows(y, positions)
    assert out.tolist() == [[101.0, 202.0], [10.0, 20.0], [0.0, 0.0]]
