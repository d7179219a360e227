"""The kernels that read peers' memory, with every rank's buffer on one device."""

import pytest
import torch
import torch.distributed as dist

import fastmoe
from fastmoe import exchange
from hf_moe_ep.expert_parallel import symmetric
from tests.distributed.host_memory import use_host_memory
from tests.distributed.ranks import run_ranks
from tests.distributed.test_ep_layer import Block, batch_of, check_layers, distributed, one_step
from tests.kernels.common import DEVICE

needs_kernels = pytest.mark.skipif(
    fastmoe.backend_name(torch.empty(0, device=DEVICE)) != "triton",
    reason="needs a GPU or Triton's interpreter",
)
RANKS, T, H, K, EXPERTS = 3, 5, 40, 3, 4  # experts of each rank


def addresses(buffers):
    return torch.tensor([b.data_ptr() for b in buffers], device=DEVICE)


def tokens_of_every_rank():
    """x (T, H), ids (T, K) and weights (T, K) of each rank; the last has two tokens fewer."""
    torch.manual_seed(0)
    counts = [T] * (RANKS - 1) + [T - 2]
    xs = [torch.randn(t, H).to(DEVICE) for t in counts]
    ids = [torch.randint(RANKS * EXPERTS, (t, K)).to(DEVICE) for t in counts]
    weights = [torch.rand(t, K).to(DEVICE) for t in counts]
    return xs, ids, weights


def padded(arrays, value):
    return torch.cat([torch.cat([a, a.new_full((T - len(a), a.shape[1]), value)]) for a in arrays])


@needs_kernels
def test_each_rank_pulls_the_rows_of_its_experts():
    xs, ids, weights = tokens_of_every_rank()
    routes = [torch.empty(T * 2 * K * 4, dtype=torch.uint8, device=DEVICE) for _ in range(RANKS)]
    for place, i, w in zip(routes, ids, weights, strict=True):
        exchange.write_routes(place, i, w, T)
    every, every_weight, every_x = padded(ids, -1), padded(weights, 0.0), padded(xs, 0.0)
    for rank in range(RANKS):
        first = rank * EXPERTS
        local, pulled = exchange.pull_routes(addresses(routes), T, K, first, EXPERTS, torch.float32)
        here = (every >= first) & (every < first + EXPERTS)
        assert torch.equal(local, torch.where(here, every - first, EXPERTS).int())
        assert torch.equal(pulled, torch.where(here, every_weight, 0.0))
        rows = exchange.pull_rows(addresses(xs), local, H, EXPERTS, torch.float32)
        wanted = here.any(1)
        assert 0 < wanted.sum() < RANKS * T - 2
        assert torch.equal(rows[wanted], every_x[wanted])
        assert rows[~wanted].isnan().all()  # nothing crossed the link for them


@needs_kernels
def test_partials_are_summed_in_rank_order_from_the_ranks_that_have_them():
    _, ids, _ = tokens_of_every_rank()
    partials = [torch.randn(RANKS * T, H + K).to(DEVICE) for _ in range(RANKS)]
    published = [torch.cat([p[:, :H].flatten(), p[:, H:].flatten()]) for p in partials]
    smalls = RANKS * T * H * 4  # the byte where the second array starts
    for rank in range(RANKS):
        first = rank * T
        wide, small = (0, H, torch.float32), (smalls, K, torch.float32)
        out, few = exchange.pull_sums(
            addresses(published), [wide, small], ids[rank], T, rank, EXPERTS
        )
        (alone,) = exchange.pull_sums(addresses(published), [wide], ids[rank], T, rank, EXPERTS)
        want = torch.zeros(len(ids[rank]), H + K, device=DEVICE)
        for peer in range(RANKS):
            asked = (ids[rank] // EXPERTS == peer).any(1, keepdim=True)
            want += partials[peer][first : first + len(asked)] * asked
        assert torch.equal(out, want[:, :H]) and torch.equal(few, want[:, H:])
        assert torch.equal(alone, out)


def test_sum_rows_by_hand():
    y = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]], device=DEVICE)
    positions = torch.tensor([[0, 2], [-1, 1], [-1, -1]], device=DEVICE)
    out = fastmoe.sum_rows(y, positions)
    assert out.tolist() == [[101.0, 202.0], [10.0, 20.0], [0.0, 0.0]]


def over_host_memory(folder):
    """The figures of `check_layers`, and what differs where sums are copied to be published."""
    use_host_memory(folder)
    settings = [("symmetric", "fastmoe", "fastmoe", 1)]
    figures = check_layers(settings, (1, 4), torch.float32, {}, ("uniform",))
    experts = distributed(Block("fastmoe", torch.float32), "fastmoe", 1)
    batch = batch_of(dist.get_rank(), 5 + 2 * dist.get_rank(), 4, "uniform", 2, torch.float32)
    held, holds = [], symmetric.SharedMemory.holds
    symmetric.SharedMemory.holds = lambda *args: held.append(holds(*args)) or held[-1]
    in_place = one_step(experts, *batch)
    assert held == [True, True], "partial sums and the gradients of rows were written in place"
    symmetric._Pulled.place = None
    copied = one_step(experts, *batch)
    assert held[2:] == [False, False]
    return figures, [name for name in copied if not copied[name].equal(in_place[name])]


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda", reason="tests/distributed/test_ep_layer.py does it on GPUs")
def test_two_ranks(tmp_path):
    """A layer as on GPUs, with unequal and zero counts, forward and every gradient."""
    for figures, different in run_ranks(2, over_host_memory, tmp_path, timeout=280):
        print(*figures, sep="\n")
        assert not different
