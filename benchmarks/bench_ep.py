"""The expert-parallel benchmark: one experts layer over the ranks of a torchrun, ours beside
transformers' own AllToAllEP.

    torchrun --nproc-per-node 2 -m benchmarks.bench_ep

A correctness gate first; then all ranks time the same calls in the same order, and the slowest
rank's times count. T tokens of each rank, E experts in all, E/n on each of n ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from . import gate, report
from .environment import describe, device_slug, torchrun
from .problems import TRAINING, Inputs, Problem, make_inputs
from .ranks import join, slowest
from .timing import ColdCache, interleave, memory_of_step, synchronize

TRANSFORMERS = "transformers"
SINGLE = "one GPU"  # our own layer without EP on as many (token, expert) pairs and experts
NO_WAIT = "-no-wait"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


@dataclass(frozen=True)
class Bench:
    """What every measurement of this process shares."""

    device: torch.device
    dtype: torch.dtype
    seconds: float  # for the rounds of one quantity
    mesh: object  # (ep, tp) with tp of size 1

    @property
    def ranks(self) -> int:
        return dist.get_world_size()


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    device = join()
    on_gpu = device.type == "cuda"
    mesh = init_device_mesh(device.type, (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    dtype = torch.bfloat16 if on_gpu else torch.float32
    bench = Bench(device, dtype, args.seconds, mesh)
    base = TRAINING[0] if on_gpu else Problem("cpu-small", 64, 64, 32, 8, 2)
    counts = [int(t) for t in args.tokens.split(",")] if args.tokens else None
    rows = []
    for tokens in counts or ([16384, 4096] if on_gpu else [64]):
        rows += train(bench, base.at(tokens), args.ways.split(","))
    for tokens in map(int, filter(None, args.graph_step.split(","))):
        rows.append(graph_step(bench, base.at(tokens)))
    for tokens in [64] if on_gpu and not args.no_decode else []:
        rows += decode(bench, base.at(tokens), args.ways.split(","))
    result = {
        "benchmark": "ep",
        "mode": "ep",
        "ranks": bench.ranks,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "environment": describe(device, torchrun("bench_ep", argv), args.commit),
    }
    if dist.get_rank() == 0:
        path = args.out / f"ep{bench.ranks}-{device_slug(device)}.json"
        report.save(result, path)
        print(f"{report.table(result)}\n{path}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(any("wrong" in row for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_ep", allow_abbrev=False, description=__doc__)
    parser.add_argument("--tokens", help="tokens of each rank, with commas between")
    parser.add_argument(
        "--ways",
        default="symmetric,gather,rows" if torch.cuda.is_available() else "gather,rows",
        help=f"of HF_MOE_EP_EXCHANGE; with {NO_WAIT} at its end HF_MOE_EP_WAIT=0",
    )
    parser.add_argument(
        "--graph-step", default="", help="tokens of steps to be captured in a CUDA graph, too"
    )
    parser.add_argument("--no-decode", action="store_true", help="no forward of 64 tokens")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one quantity's rounds")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    return parser


def train(bench: Bench, p: Problem, ways: list[str]) -> list[dict]:
    """Forward and step of every implementation, once it has passed the gate."""
    inputs = make_inputs(p, bench.dtype, str(bench.device), seed=dist.get_rank())
    full_up, full_down = inputs.up, inputs.down
    for w in (full_up, full_down):  # every rank the same experts, its own tokens
        dist.broadcast(w, 0)
    layers = {TRANSFORMERS: _layer(bench, p, full_up, full_down, "grouped_mm", "all_to_all")}
    for way in ways:
        layers[way] = _layer(bench, p, full_up, full_down, "fastmoe", "fastmoe", way)
    found = _errors(bench, p, inputs, layers)
    rows = {name: _row(p, name) for name in layers}
    for way in ways:
        if wrong := _objections(found[way], found[TRANSFORMERS], bench):
            rows[way]["wrong"] = wrong
            del layers[way]
    inputs.up = inputs.down = None
    del full_up, full_down
    layers[SINGLE] = _single(bench, p)
    rows[SINGLE] = _row(p, SINGLE)
    steps = {name: _step(layer, inputs) for name, layer in layers.items()}
    forwards = {name: _forward(layer, inputs) for name, layer in layers.items()}
    for quantity, calls in (("step", steps), ("forward", forwards)):
        for name, times in _interleaved(calls, bench).items():
            rows[name][quantity] = times
    for name, layer in layers.items():
        rows[name] |= _memory(layer, inputs, bench) | _waits(steps[name], forwards[name], bench)
    return list(rows.values())


def graph_step(bench: Bench, p: Problem) -> dict:
    """Forward and backward as a replayed CUDA graph, in which nothing waits; the bits of eager.

    After everything that is timed without a graph: exchanges need more barriers from then on.
    """
    inputs = make_inputs(p, bench.dtype, str(bench.device), seed=dist.get_rank())
    for w in (inputs.up, inputs.down):
        dist.broadcast(w, 0)
    layer = _layer(bench, p, inputs.up, inputs.down, "fastmoe", "fastmoe", "symmetric" + NO_WAIT)
    step, leaves, side = _step(layer, inputs), _leaves(layer, inputs), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    want = [leaf.grad.clone() for leaf in leaves]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    got = [leaf.grad for leaf in leaves]
    for grad in got:
        grad.fill_(float("nan"))
    graph.replay()
    row = _row(p, "symmetric in a CUDA graph")
    same = [g.equal(w) for g, w in zip(got, want, strict=True)]
    everyone = [None] * bench.ranks
    dist.all_gather_object(everyone, all(same))
    if not all(everyone):
        return row | {"wrong": [f"gradients as in eager, on this rank: {same}"]}
    return row | {"step": _interleaved({"step": graph.replay}, bench)["step"]}


def decode(bench: Bench, p: Problem, ways: list[str]) -> list[dict]:
    """A forward without gradients as a replayed CUDA graph."""
    inputs = make_inputs(p, bench.dtype, str(bench.device), seed=dist.get_rank())
    for w in (inputs.up, inputs.down):
        dist.broadcast(w, 0)
    layers = {
        way: _layer(bench, p, inputs.up, inputs.down, "fastmoe", "fastmoe", way)
        for way in ways
        if way != "rows"
        and NO_WAIT not in way  # split sizes are read on the host; decode waits not
    }
    rows = {name: _row(p, name) for name in (*layers, SINGLE)}
    want = gate.reference(inputs, gradients=False)
    baseline = _layer(bench, p, inputs.up, inputs.down, "grouped_mm", "all_to_all")
    args = (inputs.x, inputs.top_k_index, inputs.top_k_weights)
    graphs, outputs = {}, {}
    with torch.no_grad():
        allowed = gate.errors({gate.OUTPUT: baseline(*args)}, want)
        for name, layer in layers.items():
            graphs[name], outputs[name] = _captured(layer, args)
        graphs[SINGLE], _ = _captured(_single(bench, p), args)
    for name, output in outputs.items():
        output.fill_(float("nan"))
        graphs[name].replay()
        if wrong := _objections(gate.errors({gate.OUTPUT: output}, want), allowed, bench):
            rows[name]["wrong"] = wrong
    for name, times in _interleaved({n: g.replay for n, g in graphs.items()}, bench).items():
        rows[name]["graph"] = times
    return list(rows.values())


def _captured(layer: nn.Module, args: tuple) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    for _ in range(3):
        layer(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(*args)
    return graph, output


def _row(p: Problem, name: str) -> dict:
    return {"problem": p.name, **{k: getattr(p, k) for k in "THIEK"}, "implementation": name}


def _experts(bench: Bench, p: Problem, implementation: str, count: int) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import hf_moe_ep  # noqa: F401  (registers "fastmoe")

    config = Qwen3MoeConfig(
        hidden_size=p.H, moe_intermediate_size=p.I, num_experts=count, num_experts_per_tok=p.K
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts._is_expert_parallel = True
    return experts


def _layer(
    bench: Bench, p: Problem, up: Tensor, down: Tensor, experts: str, ep: str, way: str = ""
) -> nn.Module:
    """An experts module with this rank's part of the weights behind an EP implementation."""
    way, patient = way.removesuffix(NO_WAIT), not way.endswith(NO_WAIT)
    from transformers.distributed.expert_parallel import EPImplementationInterface

    count = p.E // bench.ranks
    module = _experts(bench, p, experts, count)
    mine = slice(dist.get_rank() * count, (dist.get_rank() + 1) * count)
    module.gate_up_proj = nn.Parameter(up[mine].clone())
    module.down_proj = nn.Parameter(down[mine].clone())
    with mock.patch.dict(os.environ, {"HF_MOE_EP_EXCHANGE": way}):
        ep_class = EPImplementationInterface()[ep]
        module.forward = ep_class(module, bench.mesh["ep"], bench.mesh["tp"])
    if not patient:
        module.forward = partial(_without_waiting, module.forward)
    return module


def _without_waiting(forward: Callable, *args) -> Tensor:
    os.environ["HF_MOE_EP_WAIT"] = "0"
    try:
        return forward(*args)
    finally:
        del os.environ["HF_MOE_EP_WAIT"]


def _single(bench: Bench, p: Problem) -> nn.Module:
    """Our layer alone, with a rank's experts and a rank's number of (token, expert) pairs."""
    count = p.E // bench.ranks
    module = _experts(bench, p, "fastmoe", count)
    own = make_inputs(Problem("own", p.T, p.H, p.I, count, p.K), bench.dtype, str(bench.device))
    module.gate_up_proj, module.down_proj = nn.Parameter(own.up), nn.Parameter(own.down)
    forward = module.forward
    module.forward = lambda x, ids, weights: forward(x, own.top_k_index, weights)
    return module


def _errors(bench: Bench, p: Problem, inputs: Inputs, layers: dict) -> dict:
    """Errors of the output and every gradient against the wide reference with all experts."""
    want = gate.reference(inputs)
    count, rank = p.E // bench.ranks, dist.get_rank()
    for name in ("up", "down"):  # an expert's gradient covers the tokens of all ranks
        dist.all_reduce(want[name])
        want[name] = want[name][rank * count : (rank + 1) * count].clone()
    found = {}
    for name, layer in layers.items():
        x, weights = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.top_k_weights))
        with gate.poisoned_memory():
            out = layer(x, inputs.top_k_index, weights)
            leaves = (x, weights, layer.gate_up_proj, layer.down_proj)
            grads = torch.autograd.grad(out, leaves, inputs.grad)
        got = dict(
            zip(("x", "top_k_weights", "up", "down"), grads, strict=True), output=out.detach()
        )
        found[name] = gate.errors(got, want)
    return found


def _objections(mine: dict, theirs: dict, bench: Bench) -> list[str]:
    """What any rank has against `mine`."""
    everyone = [None] * bench.ranks
    dist.all_gather_object(everyone, gate.objections(mine, theirs, bench.dtype))
    return [f"rank {r}: {line}" for r, lines in enumerate(everyone) for line in lines]


def _leaves(layer: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [inputs.x, inputs.top_k_weights, layer.gate_up_proj, layer.down_proj]


def _step(layer: nn.Module, inputs: Inputs) -> Callable[[], None]:
    def step():
        leaves = _leaves(layer, inputs)
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        layer(inputs.x, inputs.top_k_index, inputs.top_k_weights).backward(inputs.grad)

    return step


def _forward(layer: nn.Module, inputs: Inputs) -> Callable[[], None]:
    def forward():
        for leaf in _leaves(layer, inputs):
            leaf.requires_grad_()
        layer(inputs.x, inputs.top_k_index, inputs.top_k_weights)

    return forward


def _interleaved(calls: dict[str, Callable], bench: Bench) -> dict[str, dict]:
    """Times of the slowest rank, all ranks starting together."""
    cold, flag = ColdCache(bench.device), torch.zeros(1, device=bench.device)

    def before():
        cold()
        dist.all_reduce(flag)

    agree = partial(slowest, device=bench.device)
    spreads = interleave(calls, bench.device, bench.seconds, before, agree)
    return {name: asdict(times) for name, times in spreads.items()}


def _memory(layer: nn.Module, inputs: Inputs, bench: Bench) -> dict:
    leaves = _leaves(layer, inputs)
    memory = memory_of_step(
        lambda: layer(inputs.x, inputs.top_k_index, inputs.top_k_weights), inputs.grad, leaves
    )
    return asdict(memory)


def _waits(step: Callable, forward: Callable, bench: Bench) -> dict:
    """How often the host waits for the device in a forward and in a step, without their end."""
    if bench.device.type != "cuda":
        return {}

    def count(call) -> int:
        synchronize(bench.device)
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
            call()
        return sum(e.count for e in profile.key_averages() if e.key in WAITS)

    empty = count(lambda: None)
    return {"waits_forward": count(forward) - empty, "waits_step": count(step) - empty}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
