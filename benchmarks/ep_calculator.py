"""The step of one experts layer under expert parallelism, on paper: bytes, bandwidths and FLOPs.

    python -m benchmarks.ep_calculator --ep 2 4 8 16 64

Uniform routing. T tokens of each rank, H hidden, I intermediate, E experts, K experts a token. The
figures below are from H200s (NVLink NV18), 2026-11; the network between nodes was not measured, so
its bandwidth is an argument. Nothing overlaps: compute, then wire.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import comb

SHAPES = {  # (H, I, E, K)
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "olmoe-1b-7b": (2048, 1024, 64, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "deepseek-v3": (7168, 2048, 256, 8),
}
NCCL_GB_S = 254.0  # all-to-all of 256 MiB, per direction, two GPUs
PUT_GB_S = 386.0  # through symmetric memory, per direction, two GPUs
TFLOP_S = 545.0  # our own step of the Qwen3-30B-A3B layer on one GPU: 6.81 ms at T=16384
BYTES = 2  # bf16


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


def step_ms(
    ep: int,
    tokens: int,
    shape: tuple[int, int, int, int],
    per_node: int = 8,
    node_gb_s: float = 50.0,
    inside_gb_s: float = PUT_GB_S,
    tflop_s: float = TFLOP_S,
) -> dict[str, float]:
    """Milliseconds of forward and backward: compute, inside the node, across; and their sum.

    Rows cross four times: dispatch and combine, and each one's backward. `node_gb_s` is one GPU's
    share of the network, per direction; 50 is a 400 Gb/s card a GPU.
    """
    hidden, intermediate, experts, top_k = shape
    rows, row = wire(ep, experts, top_k, per_node), tokens * hidden * BYTES
    flops = 3 * 6 * tokens * top_k * hidden * intermediate  # 3 GEMMs forward, 6 backward
    parts = {
        "compute": flops / tflop_s / 1e9,
        "inside": 4 * rows.inside * row / inside_gb_s / 1e6,
        "across": 4 * rows.across * row / node_gb_s / 1e6,
    }
    return parts | {"step": sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ep", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=16384, help="of each rank")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--node-gb-s", type=float, default=50.0, help="a GPU's network, one way")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    print(f"{args.shape} {shape}, {args.tokens} tokens per rank, bf16, uniform routing; on paper")
    print("| EP | rows per token: inside, across (by pair) | compute | inside | across | step ms |")
    print("|---|---|---|---|---|---|")
    for ep in args.ep:
        rows = wire(ep, *shape[2:], args.gpus_per_node)
        ms = step_ms(ep, args.tokens, shape, args.gpus_per_node, args.node_gb_s)
        print(
            f"| {ep} | {rows.inside:.2f}, {rows.across:.2f} ({rows.pairs:.2f}) "
            f"| {ms['compute']:.2f} | {ms['inside']:.2f} | {ms['across']:.2f} | {ms['step']:.2f} |"
        )


if __name__ == "__main__":
    main()
