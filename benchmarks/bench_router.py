"""What a Qwen3-30B-A3B decoder layer spends around its experts in a training step: the router's
matmul, softmax, top-k, renormalisation and casts, and the sum of two gradients, by the GPU's clock.

    python -m benchmarks.bench_router

The layer, its sparse block, the router and the experts run alone, each forward, then forward and
backward with all gradients. "around the experts" is the block less the experts. T tokens in
sequences of 4096; sums of kernel times, so what the host takes does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from . import report
from .bench_generate import make_model
from .kernel_times import launches

PARTS = ("decoder layer", "sparse block", "experts", "router")


def main(argv: list[str]) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_router", description=__doc__)
    parser.add_argument("--sequences", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--length", type=int, default=4096 if on_gpu else 16)
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if on_gpu else "cpu")
    model = make_model(1, device)
    model.set_experts_implementation("fastmoe")
    calls = parts(model, args.sequences, args.length)
    result = {
        "benchmark": "router",
        "mode": "router",
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": args.sequences * args.length,
        "rows": rows_of({name: times(*calls[name], device) for name in PARTS}),
    }
    report.finish(result, "bench_router", argv, args, device)
    return 0


def parts(model: nn.Module, sequences: int, length: int) -> dict[str, tuple[Callable, Callable]]:
    """The forward and the step of each part, on inputs of unit variance as a norm gives them."""
    layer = model.model.layers[0]
    block = layer.mlp
    shape = (sequences, length, model.config.hidden_size)
    x = torch.randn(shape, device=model.device, dtype=model.dtype, requires_grad=True)
    flat = x.detach().view(-1, shape[-1]).requires_grad_()
    positions = torch.arange(length, device=model.device)[None]
    rotary = model.model.rotary_emb(x, positions)
    with torch.no_grad():
        _, weights, ids = block.gate(flat)
    weights.requires_grad_()
    forwards = (
        (layer, lambda: _first(layer(x, position_embeddings=rotary, attention_mask=None)), [x]),
        (block, lambda: _first(block(x)), [x]),
        (block.experts, lambda: block.experts(flat, ids, weights), [flat, weights]),
        (block.gate, lambda: block.gate(flat)[1], [flat]),
    )
    calls = {}
    for name, (module, forward, inputs) in zip(PARTS, forwards, strict=True):
        grad = torch.randn_like(forward())
        leaves = [*inputs, *module.parameters()]
        calls[name] = (forward, lambda f=forward, a=leaves, g=grad: torch.autograd.grad(f(), a, g))
    return calls


def _first(out: Tensor | tuple) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def times(forward: Callable, step: Callable, device: torch.device) -> dict[str, object]:
    """Milliseconds of the forward and of forward and backward, and the step's kernels."""
    if device.type != "cuda":
        return {"forward_ms": _cpu_ms(forward), "step_ms": _cpu_ms(step), "kernels": []}
    found = {name: launches(call) for name, call in (("forward", forward), ("step", step))}
    total = {k: sum(statistics.median(ms) for _, ms in v) for k, v in found.items()}
    kernels = [(name[:100], statistics.median(ms)) for name, ms in found["step"]]
    return {"forward_ms": total["forward"], "step_ms": total["step"], "kernels": kernels}


def _cpu_ms(call: Callable) -> float:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def rows_of(measured: dict[str, dict]) -> list[dict]:
    """A row per part and the difference of the block and its experts, with shares of the layer."""
    around = {
        k: measured["sparse block"][k] - measured["experts"][k] for k in ("forward_ms", "step_ms")
    }
    rows = []
    for name, row in (measured | {"around the experts": around}).items():
        share = {
            k: row[f"{k}_ms"] / measured["decoder layer"][f"{k}_ms"] for k in ("forward", "step")
        }
        rows.append({"implementation": "fastmoe", "part": name, **row, "share": share})
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
