"""An optimizer's passes over all weights of Qwen3-30B-A3B geometry, 8 layers, bf16: AdamW's step
and gradient clipping, ours beside torch's.

    python -m benchmarks.bench_optimizer

GB/s count the bytes that a pass cannot do without: 14 a weight in a step; in clipping 2 for the
norm, and 4 more where the gradients are over the limit. Two steps from the same weights have to
give the same weights and moments but for a rounding each, else exit status 1 and no times.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_moe_ep.training import AdamW, clip_grad_norm_

from . import report
from .bench_sequence import QWEN3_30B_A3B, TINY
from .timing import interleave

LAYERS = 8
OURS, THEIRS = "fastmoe", "torch"
HOW = {"lr": 1e-2, "weight_decay": 0.1}  # steps that bf16 weights feel
# Half of bf16's eps. torch's 1 - beta is an fp32 difference, so one moment in twenty rounds the
# other way: 1.2e-3.
BOUND = 4e-3
BYTES = {"step": 14, "clip, norm below the limit": 2, "clip, norm above the limit": 6}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench_optimizer", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rounds of a pass")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = make_weights(device)
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    for p, q in zip(ours, theirs, strict=True):
        p.grad = q.grad = torch.randn_like(p).mul_(1e-3)
    gradients = [p.grad.clone() for p in ours]

    def restore() -> None:
        """Before every call: the gradients that the one before has scaled."""
        torch._foreach_copy_([p.grad for p in ours], gradients)

    optimizers = {OURS: AdamW(ours, **HOW), THEIRS: torch.optim.AdamW(theirs, fused=True, **HOW)}
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.step()
    error = largest_error(*optimizers.values())
    print(f"error {error:.1e}", flush=True)
    if not error < BOUND:
        print("ours and torch's AdamW differ", file=sys.stderr)
        return 1
    count = sum(w.numel() for w in weights)
    rows = []
    for name, calls in passes(optimizers, ours, theirs).items():
        for who, spread in interleave(calls, device, args.seconds, before=restore).items():
            gbs = BYTES[name] * count / spread.median_ms / 1e6
            rows.append({"pass": name, "implementation": who, "time": asdict(spread), "gbs": gbs})
    result = {
        "benchmark": "optimizer",
        "mode": "optimizer",
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "weights": count,
        "error": error,
        "rows": rows,
    }
    report.finish(result, "bench_optimizer", argv, args, device)
    return 0


def make_weights(device: torch.device) -> list[Tensor]:
    on_gpu = device.type == "cuda"
    sizes = QWEN3_30B_A3B if on_gpu else TINY
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=LAYERS, **sizes))
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    return [torch.randn(p.shape, **options).mul_(0.02) for p in model.parameters()]


def largest_error(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> float:
    """Of all weights, and of either moment: the norm of the difference over that of the values."""
    squares: dict[str, list[float]] = {}
    for (p, mine), (q, other) in zip(ours.state.items(), theirs.state.items(), strict=True):
        names = ("exp_avg", "exp_avg_sq")
        pairs = {"weight": (p.detach(), q.detach())} | {n: (mine[n], other[n]) for n in names}
        for name, (got, want) in pairs.items():
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += float((got.float() - want.float()).norm()) ** 2
            sums[1] += float(want.float().norm()) ** 2
    return max(math.sqrt(difference / value) for difference, value in squares.values())


def passes(optimizers: dict, ours: list, theirs: list) -> dict[str, dict[str, Callable]]:
    """The calls of each pass."""
    norm = float(clip_grad_norm_(ours, math.inf))
    clip = torch.nn.utils.clip_grad_norm_
    found = {"step": {name: optimizer.step for name, optimizer in optimizers.items()}}
    for name, limit in zip(list(BYTES)[1:], (2 * norm, norm / 2), strict=True):
        found[name] = {
            OURS: lambda limit=limit: clip_grad_norm_(ours, limit),
            THEIRS: lambda limit=limit: clip(theirs, limit),
        }
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
