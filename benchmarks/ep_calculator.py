"""The step of one experts layer under expert parallelism, on paper: bytes, bandwidths and FLOPs.

    python -m benchmarks.ep_calculator --ep 2 8 16 64

Uniform routing. T tokens of each rank, H hidden, I intermediate, E experts, K experts a token. GEMM
speeds are those of results/train-nvidia-h200.json at as many rows an expert; the figures below are
from two H200s (NVLink NV18), 2026-11; the network between nodes was not measured, so its bandwidth
is an argument. Nothing overlaps. At 16,384 tokens it is within 1.2 of what two GPUs took; at 4096,
where they wait for the host's launches, they took up to twice what it says.
"""

from __future__ import annotations

import argparse
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from math import comb

from .report import load

SHAPES = {  # (H, I, E, K)
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "olmoe-1b-7b": (2048, 1024, 64, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "deepseek-v3": (7168, 2048, 256, 8),
}
MEASURED = {"gpt-oss-20b": "gpt-oss-20b-size", "deepseek-v3": "deepseek-v3-eighth"}  # other names
NCCL_GB_S = 254.0  # all-to-all of 256 MiB, per direction, two GPUs; used where nodes are crossed
# A rank's pull of 64 MiB out of its peer's memory, while it copies as much at home: 207 to 233 us.
PULL_GB_S = 304.0
MEMORY_GB_S = 4354.0  # of one GPU; publishing reads and writes the rows of this rank once
BYTES = 2  # bf16
GEMMS = {"forward": 3, "step": 9}  # of 2*T*K*H*I FLOPs each
EXCHANGES = {"forward": 2, "step": 4}  # of a row per token: dispatch and combine, and backward


@dataclass(frozen=True)
class Wire:
    """What one rank sends in one direction of one exchange, in rows per token."""

    inside: float  # rows to other ranks of its node. 0.5 at EP 2
    across: float  # rows to other nodes. 0.0 at EP 2
    pairs: float  # one row per (token, expert) pair instead, as transformers sends. 4.0 at EP 2


def hit(experts: int, of: int, top_k: int) -> float:
    """Probability that at least one of top_k distinct experts out of `of` is among `experts`."""
    return 1 - comb(of - experts, top_k) / comb(of, top_k)


def wire(ep: int, experts: int, top_k: int, per_node: int = 8) -> Wire:
    """Rows per token; across nodes one row per (token, node), fanned out inside the other node.

    Raises:
        ValueError: experts do not divide by ep, or ep does not fill nodes evenly.
    """
    if experts % ep or (ep > per_node and ep % per_node):
        raise ValueError(f"ep={ep}: must divide {experts} experts, and by {per_node} beyond a node")
    to_rank = hit(experts // ep, experts, top_k)
    nodes = max(1, ep // per_node)
    across = (nodes - 1) * hit(experts // nodes, experts, top_k)
    # Rows of all nodes' tokens are fanned out here: as many ranks as hold experts, but this one.
    inside = (min(ep, per_node) - 1) * to_rank * nodes
    return Wire(inside, across, top_k * (ep - 1) / ep)


@cache
def _measured(name: str, quantity: str) -> list[tuple[float, float]]:
    """(rows an expert, TFLOP/s) of our layer on one GPU, in that order."""
    problem, points = MEASURED.get(name, name), []
    for row in load("train-nvidia-h200")["rows"]:
        if (row["problem"], row["implementation"]) == (problem, "fastmoe"):
            pairs = row["T"] * row["K"]
            flops = 2 * GEMMS[quantity] * pairs * row["H"] * row["I"]
            points.append((pairs / row["E"], flops / row[quantity]["median_ms"] / 1e9))
    return sorted(points)


def gemm_tflop_s(name: str, rows: float, quantity: str = "step") -> float:
    """Between the measured points in a straight line, beyond them as at the last."""
    points = _measured(name, quantity)
    at = bisect_left([r for r, _ in points], rows)
    if at in (0, len(points)):
        return points[min(at, len(points) - 1)][1]
    (r0, v0), (r1, v1) = points[at - 1 : at + 1]
    return v0 + (v1 - v0) * (rows - r0) / (r1 - r0)


def layer_ms(
    quantity: str,
    ep: int,
    tokens: int,
    name: str,
    per_node: int = 8,
    node_gb_s: float = 50.0,
) -> dict[str, float]:
    """Milliseconds of a "forward" or of a "step", forward and backward, of the shape `name`.

    Its parts: "compute", "inside" the node, "across" nodes; and their "sum". `node_gb_s` is one
    GPU's share of the network, per direction; 50 is a 400 Gb/s card a GPU.
    """
    hidden, intermediate, experts, top_k = SHAPES[name]
    pairs = tokens * top_k
    tflop_s = gemm_tflop_s(name, pairs * ep / experts, quantity)
    rows = wire(ep, experts, top_k, per_node)
    inside_gb_s = PULL_GB_S if ep <= per_node else NCCL_GB_S
    flops = 2 * GEMMS[quantity] * pairs * hidden * intermediate
    parts = {"compute": flops / tflop_s / 1e9}
    parts |= wire_ms(rows, tokens * hidden * BYTES, EXCHANGES[quantity], inside_gb_s, node_gb_s)
    return parts | {"sum": sum(parts.values())}


def wire_ms(
    rows: Wire, row_bytes: int, exchanges: int, inside_gb_s: float, node_gb_s: float
) -> dict[str, float]:
    """Of `exchanges`, half of which publish rows first. row_bytes: of one row for every token."""
    publish = exchanges * row_bytes / MEMORY_GB_S / 1e6  # half as often, reading and writing
    return {
        "inside": exchanges * rows.inside * row_bytes / inside_gb_s / 1e6 + publish,
        "across": exchanges * rows.across * row_bytes / node_gb_s / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="ep_calculator", description=__doc__.splitlines()[0])
    parser.add_argument("--ep", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=16384, help="of each rank")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--node-gb-s", type=float, default=50.0, help="a GPU's network, one way")
    args = parser.parse_args()
    print(f"{args.shape} {SHAPES[args.shape]}: one layer, forward and backward, ms, on paper.")
    print(f"{args.tokens} tokens per rank, bf16, uniform routing, nodes of {args.gpus_per_node}")
    print(f"GPUs with {args.node_gb_s:g} GB/s of network each. H200.")
    print("| EP | experts here | compute | NVLink | network | step | step / compute | rows sent |")
    print("|---|---|---|---|---|---|---|---|")
    for ep in args.ep:
        print(line(ep, args.tokens, args.shape, args.gpus_per_node, args.node_gb_s))
    print("rows sent: by a rank per token and exchange, inside its node + to other nodes")
    print("(one per token and expert instead would be the figure in brackets).")


def line(ep: int, tokens: int, name: str, per_node: int, node_gb_s: float) -> str:
    """One row of the table."""
    *_, experts, top_k = SHAPES[name]
    rows = wire(ep, experts, top_k, per_node)
    ms = layer_ms("step", ep, tokens, name, per_node, node_gb_s)
    cells = [str(ep), str(experts // ep)]
    cells += [f"{ms[part]:.2f}" for part in ("compute", "inside", "across", "sum")]
    cells += [f"{ms['sum'] / ms['compute']:.2f}"]
    cells += [f"{rows.inside:.2f} + {rows.across:.2f} ({rows.pairs:.2f})"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
