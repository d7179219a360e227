"""One experts layer over ranks, by every way that rows travel, against the same layer on one rank.

Token counts, routing and dtypes that no whole model produces: a rank without tokens, nobody with a
token, all tokens on one rank, unequal counts; and what crosses the wire.
"""

import copy
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.expert_parallel import apply_expert_parallelism

import hf_moe_ep  # noqa: F401  (registers "fastmoe")
from hf_moe_ep.expert_parallel import autograd
from tests import families
from tests.distributed.layouts import backend_of, device_of
from tests.distributed.ranks import run_ranks

EXPERTS, HIDDEN = 16, 32
PLAN = {
    "experts.gate_up_proj": "grouped_gemm",
    "experts.down_proj": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}
# tokens of rank r, by name. Ranks of a tp group of two share those of the first.
COUNTS = {
    "equal": lambda r: 12,
    "odd and unequal": lambda r: 7 + 4 * r,
    "one rank without tokens": lambda r: 9 * r,
    "only one rank with tokens": lambda r: 11 * (r == 1),
    "nobody has a token": lambda r: 0,
}
ROUTINGS = ("uniform", "all on rank 0", "none on rank 0")


class Block(nn.Module):
    def __init__(self, experts_implementation: str, dtype):
        super().__init__()
        config = families.tiny_config(families.family("qwen3_moe"))
        config.num_experts = config.num_local_experts = EXPERTS
        config._experts_implementation = experts_implementation
        self.experts = families.family("qwen3_moe").experts_class(config)
        families.randomise(self)
        self.to(dtype)


def batch_of(rank: int, count: int, top_k: int, routing: str, world: int, dtype):
    """x (T, H), ids and weights (T, K) and a probe (T, H) of one rank."""
    g = torch.Generator().manual_seed(100 + rank)
    scores = torch.rand(count, EXPERTS, generator=g)
    local = EXPERTS // world
    if routing == "all on rank 0":
        scores[:, local:] -= 1
    elif routing == "none on rank 0":
        scores[:, :local] -= 1
    weights, ids = scores.topk(top_k)
    x, probe = torch.randn(2, count, HIDDEN, generator=g)
    return x.to(dtype), ids, weights.to(dtype), probe.to(dtype)


def one_step(experts, x, ids, weights, probe):
    """Output, and gradients of <output, probe>, keyed by what they belong to."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = experts(x, ids, weights)
    if out.requires_grad:  # not in eager without tokens
        (out * probe).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named(experts)}
    experts.zero_grad()
    none = torch.zeros_like
    return {
        "output": out.detach(),
        "x": none(x) if x.grad is None else x.grad,
        "weights": none(weights) if weights.grad is None else weights.grad,
    } | grads


def named(experts):
    return list(experts.named_parameters())


def error(got, want) -> float:
    """Relative to the largest value; of an empty or all-zero tensor absolute."""
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    scale = want.abs().max().item() or 1.0
    return ((got.double() - want.double()).abs().max() / scale).item()


def distributed(block: Block, implementation: str, tp: int):
    block, world = copy.deepcopy(block), dist.get_world_size()
    device = device_of(world)
    tp_mesh = init_device_mesh(device, (world // tp, tp), mesh_dim_names=("data", "tp"))["tp"]
    ep_mesh = init_device_mesh(device, (world,))
    block.to(device)
    return apply_expert_parallelism(block, ep_mesh, tp_mesh, PLAN, implementation).experts


def wrong(*args) -> dict[str, float]:
    """What is off on this rank -> its relative error against one rank in fp64."""
    return {
        name: found for name, (found, allowed) in errors_of(*args).items() if not found <= allowed
    }


def errors_of(block, experts, tp, top_k, count, routing, dtype) -> dict[str, tuple[float, float]]:
    """The output and every gradient -> (relative error against one rank in fp64, what may be).

    That is twice what the same experts on one rank are off in the same place, and a rounding: a
    rank's partial sums travel in `dtype`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    group, device = rank // tp, device_of(world)
    parts = [
        batch_of(g, COUNTS[count](g), top_k, routing, world, dtype) for g in range(world // tp)
    ]
    got = one_step(experts, *(t.to(device) for t in parts[group]))
    x, ids, weights, probe = map(torch.cat, zip(*parts, strict=True))
    plain = copy.deepcopy(block).experts
    peer = one_step(plain.to(device), *(t.to(device) for t in (x, ids, weights, probe)))
    plain.config._experts_implementation = "eager"
    want = one_step(plain.cpu().double(), x.double(), ids, weights.double(), probe.double())
    first = sum(len(part[0]) for part in parts[:group])
    own = slice(first, first + len(parts[group][0]))
    mine = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    errors = {}
    for name, value in got.items():
        place = own if name in ("output", "x", "weights") else mine
        value = value.to_local() if isinstance(value, DTensor) else value
        found, one_rank = (error(t.cpu(), want[name][place]) for t in (value, peer[name][place]))
        rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
        errors[name] = found, 2 * one_rank + rounding
    return errors


def check_layers(settings, tops, dtype, env, routings=ROUTINGS) -> list[str]:
    """The error that is nearest to its bound, of each setting."""
    os.environ |= env
    lines = []
    for way, implementation, kind, tp in settings:
        os.environ["HF_MOE_EP_EXCHANGE"] = way
        block = Block(kind, dtype)
        experts = distributed(block, implementation, tp)
        worst = (-1.0,)
        for n, (count, routing) in enumerate(itertools.product(COUNTS, routings)):
            autograd.FEW_SLOTS = (8192, 0)[n % 2]  # whether buffers fit the rows that came
            most = EXPERTS if routing == "uniform" else EXPERTS // dist.get_world_size()
            case = min(tops[n % len(tops)], most), count, routing
            errors = errors_of(block, experts, tp, *case, dtype)
            off = {name: error for name, error in errors.items() if not error[0] <= error[1]}
            assert not off, (way, implementation, kind, tp, dtype, case, off)
            worst = max(worst, *((e / most, e, most, name) for name, (e, most) in errors.items()))
        _, found, allowed, name = worst
        lines.append(f"{found:.1e} of {allowed:.1e} {name}: {way or implementation} {kind} tp={tp}")
    return lines


def run_layers(world: int, *args, **options) -> None:
    for rank, lines in enumerate(run_ranks(world, check_layers, *args, **options)):
        print("", *(f"rank {rank}: {line}" for line in lines), sep="\n")


SETTINGS = [  # HF_MOE_EP_EXCHANGE, ep_implementation, experts_implementation, tp_size
    ("gather", "fastmoe", "fastmoe", 1),
    ("rows", "fastmoe", "fastmoe", 1),
    ("rows", "fastmoe", "grouped_mm", 1),
    ("", "auto", "fastmoe", 2),
]
OVER_NVLINK = [("symmetric", "fastmoe", kind, 1) for kind in ("fastmoe", "grouped_mm")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ranks(dtype):
    settings = SETTINGS + (OVER_NVLINK if device_of(2) == "cuda" else [])
    run_layers(2, settings, (1, 8), dtype, {}, backend=backend_of(2), timeout=240)


def test_four_ranks_on_two_nodes():
    settings = [("nodes", "fastmoe", "fastmoe", tp) for tp in (1, 2)]
    nodes = {"HF_MOE_EP_RANKS_PER_NODE": "2"}
    run_layers(4, settings, (1, 4), torch.float32, nodes, backend=backend_of(4))


@pytest.mark.grid
@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_ranks(world, dtype):
    settings = SETTINGS + [(w, e, k, 2) for w, e, k, tp in SETTINGS if tp == 1]
    run_layers(world, settings, (1, 8), dtype, {}, timeout=600)


@pytest.mark.grid
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_ranks_on_nodes(ranks_per_node, dtype):
    settings = [("nodes", "fastmoe", "fastmoe", tp) for tp in (1, 2)]
    env = {"HF_MOE_EP_RANKS_PER_NODE": str(ranks_per_node)}
    run_layers(8, settings, (1, 8), dtype, env, timeout=600)


def eager_is_refused() -> None:
    experts = distributed(Block("eager", torch.float32), "fastmoe", 1)
    with pytest.raises(ValueError, match="grouped_mm"):
        experts(*batch_of(dist.get_rank(), 4, 2, "uniform", 2, torch.float32)[:3])
    with torch.no_grad():
        experts(*batch_of(dist.get_rank(), 4, 2, "uniform", 2, torch.float32)[:3])


def test_eager_experts_do_not_train():
    run_ranks(2, eager_is_refused)


# --- how often the host waits ------------------------------------------------------------------

READS = ("tolist", "item", "__int__", "__bool__", "__float__", "__index__")


def host_reads(ways) -> list[tuple[int, int]]:
    """How often forward and backward of an exchange read a tensor on the host, for each way."""
    reads, found = 0, []

    def counting(read):
        def call(tensor):
            nonlocal reads
            reads += 1
            return read(tensor)

        return call

    for name in READS:
        setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    for way, patience in ways:
        os.environ |= {"HF_MOE_EP_EXCHANGE": way, "HF_MOE_EP_WAIT": patience}
        os.environ["HF_MOE_EP_RANKS_PER_NODE"] = "2"
        autograd.FEW_SLOTS = 0
        layer = distributed(Block("fastmoe", torch.float32), "fastmoe", 1).forward
        layer.experts_forward = weighted  # reads nothing: the CPU's own experts do
        x, ids, weights, probe = batch_of(dist.get_rank(), 9, 4, "uniform", 4, torch.float32)
        x.requires_grad_(), weights.requires_grad_()
        layer(x, ids, weights)  # what the first call finds out about the group
        reads = 0
        loss = (layer(x, ids, weights) * probe).sum()
        forward, reads = reads, 0
        loss.backward()
        found.append((forward, reads))
    return found


def weighted(rows, ids, weights, routing, place):
    here = int(torch.sum(ids < EXPERTS // 4).numpy())
    most = ids.numel() if os.environ["HF_MOE_EP_WAIT"] == "0" else here
    assert routing().perm.numel() == most, "a buffer for every slot that is in use, and no other"
    return rows * weights.sum(1, keepdim=True)


def test_the_host_waits_once_in_forward_and_never_in_backward():
    ways = [("gather", ""), ("rows", ""), ("nodes", ""), ("gather", "0")]
    for found in run_ranks(4, host_reads, ways):
        assert found == [(1, 0), (1, 0), (1, 0), (0, 0)]


# --- what crosses the wire -------------------------------------------------------------------


def rows_between_nodes(way: str, ranks_per_node: int, top_k: int) -> tuple[int, int, int]:
    """Rows of width HIDDEN that leave this rank's node in a step, and what should.

    That is: one for each of its tokens and each other node with one of its experts, in forward and
    again in backward; as many come back for other ranks' tokens, so compare sums over ranks.
    Third: the same with one row per token and rank.
    """
    os.environ |= {"HF_MOE_EP_EXCHANGE": way, "HF_MOE_EP_RANKS_PER_NODE": str(ranks_per_node)}
    rank, world = dist.get_rank(), dist.get_world_size()
    block, sent, send = Block("fastmoe", torch.float32), 0, dist.all_to_all_single

    def counting(out, x, out_sizes=None, sizes=None, group=None, **kwargs):
        nonlocal sent
        if x.dim() == 2 and x.shape[1] == HIDDEN and sizes is not None:
            ranks = dist.get_process_group_ranks(group)
            away = [r // ranks_per_node != rank // ranks_per_node for r in ranks]
            sent += sum(n for n, far in zip(sizes, away, strict=True) if far)
        return send(out, x, out_sizes, sizes, group=group, **kwargs)

    dist.all_to_all_single = counting
    experts = distributed(block, "fastmoe", 1)
    x, ids, weights, probe = batch_of(rank, 10 + rank, top_k, "uniform", world, torch.float32)
    one_step(experts, x, ids, weights, probe)
    owners = ids // (EXPERTS // world)
    pairs = {"node": 0, "rank": 0}
    for token in owners.tolist():
        away = [r for r in token if r // ranks_per_node != rank // ranks_per_node]
        pairs["node"] += len({r // ranks_per_node for r in away})
        pairs["rank"] += len(set(away))
    return sent, 4 * pairs["node"], 4 * pairs["rank"]


def test_one_row_per_token_and_node():
    ranks = run_ranks(4, rows_between_nodes, "nodes", 2, 6)
    sent, per_node, per_rank = (sum(column) for column in zip(*ranks, strict=True))
    assert sent == per_node
    assert per_node < 0.7 * per_rank  # the case shows a difference
    ranks = run_ranks(4, rows_between_nodes, "rows", 2, 6)
    assert sum(sent for sent, _, _ in ranks) == per_rank


@pytest.mark.grid
@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_one_row_per_token_and_node_of_eight_ranks(ranks_per_node):
    ranks = run_ranks(8, rows_between_nodes, "nodes", ranks_per_node, 8)
    sent, per_node, per_rank = (sum(column) for column in zip(*ranks, strict=True))
    assert sent == per_node < per_rank
