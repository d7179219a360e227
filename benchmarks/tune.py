"""Time candidate block shapes of each GEMM kernel on this GPU and print the fastest.

See python -m benchmarks.tune --help.

Each candidate is checked against the first one's result before it is timed. The winners go into
kernel_repo/torch-ext/fastmoe/configs/<gpu>.json by hand or with --write.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

import fastmoe
from fastmoe import grouped_gemm, tuning
from fastmoe.routing import route

from . import problems

KERNELS = ("up_gate", "down", "gate_backward", "input_grad", "weight_grad_up", "weight_grad_down")


def candidates(kernel: str, rows: int) -> list[tuning.GemmConfig]:
    """Block shapes worth a try for tiles of `rows` rows.

    What does not fit the GPU is fitted or fails and is left out.
    """
    make = tuning.GemmConfig
    wide = (
        [(128, 8, 1), (256, 8, 1)]
        if rows == 128
        else [(128, 4, 1), (128, 4, 2), (256, 4, 1), (256, 8, 1)]
    )
    if rows == 128:
        wide.append((128, 4, 2))
    if kernel == "up_gate":
        wide = [(n // 2, w, c) for n, w, c in wide]
    stages = (3, 4, 5) if kernel.startswith("weight_grad") else (3, 4)
    flat = (False, True)
    found = [
        make(rows, n, 64, w, s, 8, f, c)
        for (n, w, c), s, f in itertools.product(wide, stages, flat)
    ]
    if kernel.startswith("weight_grad"):
        found = [replace(c, block_m=128, block_k=min(64, rows)) for c in found if c.block_n >= 128]
    return found


class Workload:
    """One problem's tensors, and a call for each kernel on them."""

    def __init__(self, problem: problems.Problem, dtype: torch.dtype):
        self.i = i = problems.make_inputs(problem, dtype, "cuda")
        self.block_m = tuning.bucket(i.top_k_index.numel(), problem.E)
        self.r = r = route(i.top_k_index, problem.E, self.block_m)
        self.gate = fastmoe.Gate()
        self.h, self.a = grouped_gemm.up_gate(i.x, i.up, None, r, self.gate, False, True)
        self.grad_h, self.aw, self.dots = grouped_gemm.gate_backward(
            i.grad, i.top_k_weights, i.down, self.h, r, self.gate, False, True
        )
        rows = i.top_k_index.numel()
        gemm = 2 * rows * problem.H * problem.I
        self.flops = dict(
            up_gate=2 * gemm, down=gemm, gate_backward=gemm, input_grad=2 * gemm,
            weight_grad_up=2 * gemm, weight_grad_down=gemm,
        )  # fmt: skip

    def call(self, kernel: str):
        i, r = self.i, self.r
        return {
            "up_gate": lambda: grouped_gemm.up_gate(i.x, i.up, None, r, self.gate, False, True),
            "down": lambda: grouped_gemm.grouped_linear(self.a, i.down, None, r, False, False),
            "gate_backward": lambda: grouped_gemm.gate_backward(
                i.grad, i.top_k_weights, i.down, self.h, r, self.gate, False, True
            ),
            "input_grad": lambda: grouped_gemm.grouped_linear(
                self.grad_h, i.up, None, r, True, False
            ),
            "weight_grad_up": lambda: grouped_gemm.weight_grad(self.grad_h, i.x, r, True, False),
            "weight_grad_down": lambda: grouped_gemm.weight_grad(self.aw, i.grad, r, True, True),
        }[kernel]


def tune(work: Workload, kernel: str, ms: int) -> list[dict]:
    """Every candidate's time in ms and TFLOP/s, fastest first."""
    key = {"down": "linear", "input_grad": "linear"}.get(
        kernel, kernel.removesuffix("_up").removesuffix("_down")
    )
    table = tuning._table(torch.device("cuda", 0))[0][str(work.block_m)]
    shipped, call, results, truth = table[key], work.call(kernel), [], None
    for config in [shipped, *candidates(kernel, work.block_m)]:
        table[key] = config
        try:
            out = call()
            out = out[0] if isinstance(out, tuple) else out
            truth = out.float() if truth is None else truth
            error = float((out.float() - truth).norm() / truth.norm())
            if not error < 1e-2:
                results.append(
                    dict(
                        kernel=kernel,
                        error=error,
                        ms=float("inf"),
                        tflops=0.0,
                        config=asdict(config),
                    )
                )
                continue
            del out
            time = triton.testing.do_bench(call, warmup=ms // 4, rep=ms, return_mode="median")
            results.append(
                dict(
                    kernel=kernel,
                    error=error,
                    ms=time,
                    tflops=work.flops[kernel] / time / 1e9,
                    config=asdict(config),
                )
            )
        except (
            Exception
        ) as error:  # a shape the compiler or the GPU refuses is a result, not a failure
            results.append(
                dict(
                    kernel=kernel,
                    ms=float("inf"),
                    tflops=0.0,
                    refused=repr(error)[:200],
                    config=asdict(config),
                )
            )
    table[key] = shipped
    return sorted(results, key=lambda r: r["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--problem", default="QWEN3_30B")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ms", type=int, default=40, help="time spent on each candidate")
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = Workload(getattr(problems, args.problem).at(args.tokens), torch.bfloat16)
    found = {}
    for kernel in args.kernels:
        found[kernel] = tune(work, kernel, args.ms)
        for r in found[kernel][: args.top]:
            c = r["config"]
            print(
                f"{kernel:17s} {r['ms']:.3f} ms {r['tflops']:6.1f} TFLOP/s  {list(c.values())}",
                flush=True,
            )
        refused = [r for r in found[kernel] if "refused" in r or r.get("error", 0) >= 1e-2]
        if refused:
            print(f"  {len(refused)} refused or wrong, first: {refused[0]}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
