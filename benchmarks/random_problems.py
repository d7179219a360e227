"""Random problems against the reference, each named by its seed: output, every gradient, the same
bits twice and when h is recomputed, in memory that starts as NaN.

    python -m benchmarks.random_problems --count 1000

Layouts, gates, dtypes, H, I and K come from a short list, because Triton compiles for each of them;
T, E, skew, sentinels and the routing are free. T, H, I, E, K as in problems.py.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hf_moe_ep.kernel import get_kernel

from . import gate, report
from .environment import command, describe, device_slug
from .problems import OF_GPT_OSS, Inputs, Problem, make_inputs

# (dtype, experts layer): T and E are drawn. The first four fit the Hopper kernels' tiles, the next
# have rows for bulk copies, the odd ones neither.
POOL = (
    ("bfloat16", Problem("swiglu", 0, 512, 256, 0, 8)),
    ("bfloat16", Problem("gpt_oss", 0, 320, 192, 0, 4, **OF_GPT_OSS)),
    ("float16", Problem("swiglu_fp16", 0, 256, 128, 0, 2)),
    ("bfloat16", Problem("transposed", 0, 512, 256, 0, 6, transposed=True)),
    ("bfloat16", Problem("top1", 0, 256, 384, 0, 1)),
    ("bfloat16", Problem("swiglu_no_tile", 0, 328, 200, 0, 4)),
    ("bfloat16", Problem("geglu", 0, 320, 160, 0, 2, gate="gelu", transposed=True)),
    ("float16", Problem("interleaved", 0, 256, 360, 0, 4, interleaved=True, bias=True)),
    ("float16", Problem("clamped", 0, 256, 192, 0, 3, gate="clamped", bias=True)),
    ("bfloat16", Problem("odd", 0, 333, 171, 0, 3)),
    ("float16", Problem("relu2", 0, 256, 256, 0, 8, gate="relu2", gated=False)),
    ("float16", Problem("silu_bias", 0, 200, 136, 0, 2, gate="silu", gated=False, bias=True)),
    ("float32", Problem("swiglu_fp32", 0, 256, 128, 0, 4)),
    ("float32", Problem("geglu_tanh_odd", 0, 97, 65, 0, 5, gate="gelu_tanh", bias=True)),
    ("float32", Problem("gpt_oss_fp32", 0, 120, 120, 0, 4, **OF_GPT_OSS)),
    ("bfloat16", Problem("reglu_odd_transposed", 0, 250, 190, 0, 2, gate="relu", transposed=True)),
)
MAX_ROWS = 16384  # T * K
FEW = 64
CPU_SHRINK = 8  # of H, I and E on a CPU, where a kernel is interpreted
CPU_MAX_ROWS = 96


@dataclass(frozen=True)
class Finding:
    """What the check of one problem found."""

    seed: int
    problem: dict  # asdict(Problem), with its dtype
    objections: list[str]  # why it fails, one line each; empty when it passes
    used: float  # largest error as a share of what is allowed; 0.61
    where: str  # the tensor and measure of that error; "up worst"


def draw(seed: int, device: str) -> tuple[Problem, torch.dtype]:
    """The problem of a seed; seeds go through POOL in turn."""
    rng = random.Random(seed)
    dtype, p = POOL[seed % len(POOL)]
    cuda = device == "cuda"
    if not cuda:
        p = replace(p, H=p.H // CPU_SHRINK, I=p.I // CPU_SHRINK)
    if os.environ.get("TRITON_INTERPRET") == "1":
        dtype = "float32"  # the interpreter's tiles are for it alone
    # A multiple of 16 or not is one more thing that Triton compiles for: a layout keeps to either.
    experts = (16, 32, 48, 64) if seed % 2 == 0 else (9, 14, 27, 40)
    E = max(rng.choice(experts) // (1 if cuda else CPU_SHRINK), p.K)
    rows = E * math.exp(rng.uniform(math.log(0.5), math.log(400.0)))  # rows an expert
    T = int(min(rows, MAX_ROWS if cuda else CPU_MAX_ROWS) / p.K) + 1
    T = rng.choices((T, rng.randint(1, 4), 0), (85, 13, 2))[0]
    routing = rng.choices(("random", "one_expert", "few_experts"), (84, 8, 8))[0]
    return replace(
        p,
        T=T,
        E=E,
        routing=routing,
        skew=rng.choice((0.0, rng.uniform(0.2, 1.5))),
        sentinels=rng.choices((0.0, rng.random(), 1.0), (60, 37, 3))[0],
    ), getattr(torch, dtype)


def check(seed: int, device: str, experts=None) -> Finding:
    """Hold one problem against the reference. `experts` replaces fastmoe's `fused_experts`."""
    kernel = get_kernel()
    p, dtype = draw(seed, device)
    inputs = make_inputs(p, dtype, device, seed)
    truth = _run(kernel.reference_experts, p, inputs, gate.wide(dtype))
    truth = {n: t for n, t in truth.items() if t.numel()}  # of no tokens there is nothing to hold
    plain = gate.errors(_run(kernel.reference_experts, p, inputs), truth)
    on_clamp = _on_clamp(p, inputs, truth, dtype)
    experts = experts or kernel.fused_experts
    with gate.poisoned_memory():
        got, again = (_run(experts, p, inputs) for _ in range(2))
        lean = _run(experts, p, inputs, recompute=True)
        with torch.no_grad():  # without gradients other kernels run
            forward, anew = (_call(experts, p, inputs.leaves(), inputs) for _ in range(2))
    forward = {gate.OUTPUT: forward}
    repeats = (("on a second run", again), ("when h is recomputed", lean))
    lines = [f"{n}: other bits {s}" for s, r in repeats for n in got if not got[n].equal(r[n])]
    if not forward[gate.OUTPUT].equal(anew):
        lines.append("without gradients, output: other bits on a second run")
    used, where = 0.0, "-"
    for label, found in (("", got), ("without gradients, ", forward)):
        for name, error in gate.errors(
            found, {n: t for n, t in truth.items() if n in found}
        ).items():
            for measure, value, bound in _bounds(
                error, plain[name], on_clamp.get(name), truth[name], dtype
            ):
                share = value / bound if value == value else math.inf
                if share > used:
                    used, where = share, f"{label}{name} {measure}"
                if share > 1:
                    lines.append(f"{label}{name}: {measure} error {value:.3g} above {bound:.3g}")
    return Finding(seed, _described(p, dtype), lines, used, where)


def _described(p: Problem, dtype: torch.dtype) -> dict:
    return asdict(p) | {"dtype": str(dtype).removeprefix("torch.")}


def _on_clamp(
    p: Problem, inputs: Inputs, truth: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, gate.Error]:
    """What values within rounding of a clamped gate's limit change, by falling on either side.

    There the gradient behind the gate jumps from something to nothing. From two wide references,
    whose limits are a rounding lower and higher; {} for other gates.
    """
    limit = p.gate_options.get("limit")
    if limit is None:
        return {}
    reference = get_kernel().reference_experts
    low, high = (
        _run(reference, p, inputs, gate.wide(dtype), limit=limit * (1 + s * _rounding(dtype)))
        for s in (-1, 1)
    )
    jumping = {n: t for n, t in truth.items() if n in ("x", "up", "up_bias")}
    return gate.errors({n: t + high[n] - low[n] for n, t in jumping.items()}, jumping)


def _rounding(dtype: torch.dtype) -> float:
    """Of a sum of H products, relative: fp32 sums are rounded at each of them."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)


def _bounds(
    error: gate.Error,
    plain: gate.Error,
    on_clamp: gate.Error | None,
    truth: torch.Tensor,
    dtype: torch.dtype,
):
    """(measure, value, what is allowed) of one tensor, by plain PyTorch's error in its dtype.

    Twice overall and four times in the worst row, as in gate.py, plus rounding and what `_on_clamp`
    says. That of few numbers is luck on either side, so they are given four times as much.
    """
    eps = _rounding(dtype)
    few = int(truth.count_nonzero()) < FEW
    norm, worst = (on_clamp.norm, on_clamp.worst) if on_clamp else (0.0, 0.0)
    yield "norm", error.norm, 2 * plain.norm + norm + (eps if few else eps / 4)
    yield "worst", error.worst, 4 * plain.worst + worst + eps


def _call(
    function, p: Problem, leaves: dict[str, torch.Tensor], inputs: Inputs, limit=None, **options
) -> torch.Tensor:
    """`limit` replaces the gate's."""
    gate_options = p.gate_options | ({} if limit is None else {"limit": limit})
    return function(
        leaves["x"], inputs.top_k_index, leaves["top_k_weights"], leaves["up"], leaves["down"],
        up_bias=leaves.get("up_bias"), down_bias=leaves.get("down_bias"),
        is_transposed=p.transposed, gate=get_kernel().Gate(**gate_options), **options,
    )  # fmt: skip


def _run(function, p: Problem, inputs: Inputs, dtype: torch.dtype | None = None, **options):
    """The output and the gradient of every leaf, in `dtype` or the inputs' own."""
    leaves = {
        n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in inputs.leaves().items()
    }
    out = _call(function, p, leaves, inputs, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad.to(out.dtype))
    return {gate.OUTPUT: out.detach()} | dict(zip(leaves, grads, strict=True))


def _check_all(seeds: list[int], device: str) -> list[Finding]:
    """A worker's share. After an error that the device does not survive the rest fails too."""
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        try:
            found.append(check(seed, device))
        except Exception as e:  # a failing problem is a finding
            traceback.print_exc()
            line = f"{type(e).__name__}: {str(e)[:200]}"
            found.append(Finding(seed, _described(*draw(seed, device)), [line], math.inf, "-"))
    return found


def check_many(seeds: range, device: str, workers: int) -> list[Finding]:
    """Findings in the order of the seeds; a layout's problems stay with one worker, which compiles.

    The workers share the device.
    """
    shares = [[s for s in seeds if s % len(POOL) % workers == w] for w in range(workers)]
    if workers == 1:
        found = [_check_all(shares[0], device)]
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hf_moe_ep.kernel", "triton"])  # neither touches the GPU
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            found = list(pool.map(_check_all, shares, [device] * workers))
    return sorted((f for share in found for f in share), key=lambda f: f.seed)


def result_of(findings: list[Finding], seconds: float) -> dict:
    """The counts, the failures and a row per dtype, for JSON."""
    rows = []
    for dtype in dict.fromkeys(f.problem["dtype"] for f in findings):
        mine = [f for f in findings if f.problem["dtype"] == dtype]
        worst = max(mine, key=lambda f: f.used)
        rows.append({
            "implementation": "fastmoe", "dtype": dtype, "problems": len(mine),
            "passed": sum(not f.objections for f in mine),
            "used": worst.used if math.isfinite(worst.used) else None,
            "where": worst.where, "seed": worst.seed,
        })  # fmt: skip
    return {
        "benchmark": "random_problems",
        "mode": "random",
        "dtype": ", ".join(r["dtype"] for r in rows),
        "problems": len(findings),
        "passed": sum(not f.objections for f in findings),
        "seconds": seconds,
        "failures": [
            {"seed": f.seed, "problem": f.problem, "objections": f.objections}
            for f in findings
            if f.objections
        ],
        "rows": rows,
    }


def main(argv: list[str]) -> int:
    """Check `--count` problems. Returns 1 when one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_problems", description=__doc__
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed; --count 1 for one")
    parser.add_argument("--workers", type=int, help="processes (default: one a core, 1 on a CPU)")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    most = min(len(POOL), args.count, os.cpu_count() or 1) if device.type == "cuda" else 1
    started = time.perf_counter()
    seeds = range(args.first, args.first + args.count)
    findings = check_many(seeds, device.type, args.workers or most)
    result = result_of(findings, time.perf_counter() - started)
    said = command("python -m benchmarks.random_problems", argv)
    result["environment"] = describe(device, said, args.commit)
    for failure in result["failures"]:
        print(f"seed {failure['seed']}: {'; '.join(failure['objections'])}\n  {failure['problem']}")
    path = args.out / f"random-{device_slug(device)}.json"
    report.save(result, path)
    print(f"{report.table(result)}\n\n{result['passed']} of {result['problems']} problems passed "
          f"in {result['seconds']:.0f} s\n{path}")  # fmt: skip
    return int(result["passed"] != result["problems"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
