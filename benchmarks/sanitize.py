"""The experts and the exchange on small shapes under compute-sanitizer: bad accesses and races.

    python -m benchmarks.sanitize --out bench_output

A first run without the tool fills Triton's cache, then each tool runs the same cases, every case in
a process of its own, all side by side. Every tensor is an allocation of its own, but for the
temporaries of a call that is made again. The exit status is 1 on a finding, a warning counts, and 2
where the tool is missing or did not run.

racecheck sees Triton's kernels alone, also where Gluon's would serve: it does not follow
`warp_specialize`, and reports a race in a producer and a reader of a few lines that are right.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from hf_moe_ep.kernel import get_kernel

from . import report
from .problems import OF_GPT_OSS, Inputs, Problem, make_inputs

TOOLS = ("memcheck", "racecheck")
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error"),
    "racecheck": re.compile(
        r"RACECHECK SUMMARY: \d+ hazards? displayed"
        r" \((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"
    ),
}
CXX = "kernel_substring=_Z"  # kernels with mangled names: torch's, which took most of the time
KERNEL = re.compile(r"\bat (\w+)\+0x[0-9a-f]+")

# Tiles of 128, 64, 32 and 16 rows; sizes for the Hopper kernels, for bulk copies alone, and for
# neither. T, H, I, E, K.
_TILES = Problem("tiles", 400, 256, 128, 4, 2, sentinels=0.2)
_PROBLEMS = (
    (_TILES, "bfloat16"),
    (replace(_TILES, T=100, transposed=True), "float16"),
    (replace(_TILES, T=50), "bfloat16"),
    (Problem("bulk", 30, 136, 72, 4, 2, skew=1.0), "bfloat16"),
    (Problem("gpt_oss", 150, 136, 136, 4, 2, **OF_GPT_OSS), "bfloat16"),
    (Problem("gpt_oss_tiles", 150, 192, 192, 4, 2, **OF_GPT_OSS), "bfloat16"),
    (Problem("odd", 70, 133, 67, 3, 3, bias=True, gate="gelu_tanh"), "bfloat16"),
    (Problem("ungated", 40, 64, 96, 5, 1, gated=False, gate="relu2"), "float16"),
    (Problem("fp32", 90, 96, 80, 4, 2), "float32"),
)
CASES = {f"{p.name}@{p.T}": (p, dtype) for p, dtype in _PROBLEMS}
EXCHANGE = "exchange"
NAMES = (*CASES, EXCHANGE)


def run_case(name: str, device: str, triton_only: bool = False) -> None:
    """One of `NAMES`: the exchange; or of a problem forward and backward, gradients added to a
    main_grad, without gradients, a few tokens, a gate as written, and the check for values that are
    not finite.

    Raises RuntimeError for a value that is not finite.
    """
    kernel = get_kernel()
    if triton_only:
        kernel.hopper.available = lambda device: False
    if name == EXCHANGE:
        if kernel.backend_name(torch.empty(0, device=device)) == "triton":
            _exchange(kernel.exchange, device)
        return
    p, dtype = CASES[name]
    inputs = make_inputs(p, getattr(torch, dtype if device == "cuda" else "float32"))
    inputs = Inputs(**{n: t if t is None else t.to(device) for n, t in vars(inputs).items()})
    gate = kernel.Gate(**p.gate_options)
    leaves = [t.requires_grad_() for t in inputs.leaves().values()]
    gates = [gate] if p.bias else [gate, lambda h: gate(h)]
    for function in gates:
        out = _experts(kernel, p, inputs, function, slice(None))
        found = [out, *torch.autograd.grad(out, leaves, inputs.grad)]
    with torch.no_grad():
        counts = (p.T, 4, 1) * 2  # each again by its launches alone
        found += [_experts(kernel, p, inputs, gate, slice(0, n)) for n in counts]
    for weight in (inputs.up, inputs.down):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    _experts(kernel, p, inputs, gate, slice(None)).backward(inputs.grad)
    found += [inputs.up.main_grad, inputs.down.main_grad]
    bad = int(kernel.first_not_finite(found))
    if bad < len(found) or not all(bool(t.isfinite().all()) for t in found):
        raise RuntimeError(f"{name}: tensor {bad} is not finite")


def _experts(kernel, p: Problem, i: Inputs, gate, tokens: slice) -> torch.Tensor:
    return kernel.fused_experts(
        i.x[tokens], i.top_k_index[tokens], i.top_k_weights[tokens], i.up, i.down, gate=gate,
        up_bias=i.up_bias, down_bias=i.down_bias, is_transposed=p.transposed,
    )  # fmt: skip


def _exchange(exchange, device: str) -> None:
    """The kernels that read peers' memory, every rank's buffer on this device."""
    ranks, tokens, hidden, top_k, experts = 2, 9, 136, 3, 4  # experts of each rank
    x = [torch.ones(tokens, hidden, device=device) for _ in range(ranks)]
    ids = torch.arange(tokens * top_k, device=device).view(tokens, top_k) % (ranks * experts)
    weights = torch.ones(tokens, top_k, device=device)
    routes = [
        torch.empty(tokens * 2 * top_k * 4, dtype=torch.uint8, device=device) for _ in range(ranks)
    ]
    for place in routes:
        exchange.write_routes(place, ids[:-1], weights[:-1], tokens)
    boards, rows = (torch.tensor([t.data_ptr() for t in ts], device=device) for ts in (routes, x))
    local, _ = exchange.pull_routes(boards, tokens, top_k, 0, experts, torch.float32)
    exchange.pull_rows(rows, local, hidden, experts, torch.float32)
    partials = [torch.ones(ranks * tokens, hidden, device=device) for _ in range(ranks)]
    places = torch.tensor([t.data_ptr() for t in partials], device=device)
    arrays = [(0, hidden, torch.float32), (0, top_k, torch.float32)]
    sums, _ = exchange.pull_sums(places, arrays, ids, tokens, 0, experts)
    if not bool(((sums == 1) | (sums == 2)).all()):
        raise RuntimeError("exchange: sums of ones over one or two ranks are neither 1 nor 2")


def under(tool: str, limit: float, names: Sequence[str] = NAMES) -> dict[str, object]:
    """A row for JSON: the findings of one tool.

    Raises RuntimeError when it did not run through, or took more than `limit` seconds.
    """
    started = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda name: _findings(tool, name, limit), names))
    return {
        "implementation": "fastmoe",
        "tool": tool,
        "errors": sum(counts["errors"] for counts, _ in found),
        "warnings": sum(counts.get("warnings", 0) for counts, _ in found),
        "kernels": dict(sum((kernels for _, kernels in found), Counter())),
        "cases": list(names),
        "seconds": time.perf_counter() - started,
    }


def _findings(tool: str, name: str, limit: float) -> tuple[dict[str, int], Counter]:
    """(counts of errors and warnings, of kernels named in them) of a tool over one case."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name-exclude", CXX]
    try:
        done = subprocess.run(
            [*command, *_command(name, tool)],
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise RuntimeError(f"{tool} of {name} did not end in {limit:.0f} s") from e
    output = done.stdout + done.stderr
    summary = SUMMARY[tool].search(output)
    counts = {k: int(v) for k, v in summary.groupdict().items()} if summary else {}
    if not summary or (done.returncode and not any(counts.values())):
        said = f"{tool} did not run over {name} (status {done.returncode}):\n{output[-3000:]}"
        raise RuntimeError(said)
    if any(counts.values()):
        print(f"{name}:\n{output[-4000:]}")
    return counts, Counter(KERNEL.findall(output))


def _command(name: str, tool: str) -> list[str]:
    command = [sys.executable, "-m", f"{__package__}.sanitize", "--case", name]
    return [*command, "--triton-only"] if tool == "racecheck" else command


def _compile(names: Sequence[str], tool: str) -> None:
    """Runs the cases of a tool without it, so that it does not watch the compiler."""
    runs = [subprocess.Popen(_command(name, tool)) for name in names]
    if failed := [name for name, run in zip(names, runs, strict=True) if run.wait()]:
        raise RuntimeError(f"{', '.join(failed)} failed without a tool")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--case", choices=NAMES, help="run this one here, without a tool")
    parser.add_argument("--triton-only", action="store_true", help="with --case: not Gluon's")
    parser.add_argument("--names", default=",".join(NAMES), help="cases, with commas between")
    parser.add_argument("--limit", type=float, default=400, help="seconds for each tool")
    parser.add_argument("--tools", default=",".join(TOOLS), help="with commas between")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.case:
        run_case(args.case, device.type, args.triton_only)
        return 0
    names, tools = args.names.split(","), args.tools.split(",")
    for given, known in ((names, NAMES), (tools, TOOLS)):
        if unknown := set(given) - set(known):
            parser.error(f"nothing is called {sorted(unknown)}; choose from {known}")
    if device.type != "cuda" or shutil.which("compute-sanitizer") is None:
        print("error: needs a CUDA GPU, and compute-sanitizer (part of the CUDA toolkit) on PATH")
        return 2
    started = time.perf_counter()
    rows: list[dict[str, object]] = []
    for tool in tools:
        try:
            _compile(names, tool)
            print(f"[{time.perf_counter() - started:6.1f} s] compiled", flush=True)
            rows.append(under(tool, args.limit, names))
        except RuntimeError as e:
            print(f"error: {e}")
            return 2
        result = {
            "benchmark": "sanitize",
            "mode": "sanitize",
            "dtype": ", ".join(dict.fromkeys(CASES[n][1] for n in names if n in CASES)),
            "rows": rows,
        }
        report.finish(result, "sanitize", argv, args, device)  # after each tool: they take minutes
    return int(any(row["errors"] or row["warnings"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
