"""What holds a training step back: the chip's clock and power while steps follow each other, and
what its counters say of each large kernel (Nsight Compute, `ncu`, where it may read them). At the
size of Qwen3-30B-A3B's experts.

Clocks are left alone; `ncu` would hold the base clock unless told otherwise. It runs a kernel once
for each group of counters, with pauses between, so clocks there are those of short loads.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import floors, peers, report
from .problems import QWEN3_30B, Inputs, Problem, make_inputs
from .timing import drop_gradients

KERNELS = "^(up_gate|grouped_linear|gate_backward|weight_grad)_kernel"
# Column of a row -> counter. Shares are percentages of what the unit can do; "tensor" is of the
# time in which a multiprocessor had work.
COUNTERS = {
    "ms": "gpu__time_duration.sum",
    "clock": "gpc__cycles_elapsed.avg.per_second",
    "busy": "sm__cycles_active.avg",
    "cycles": "sm__cycles_elapsed.avg",
    "tensor": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
UNITS = {"nsecond": 1e-6, "ns": 1e-6, "hz": 1e-6}  # ncu's, to milliseconds and to MHz
# What nvidia-smi is asked ten times a second.
ASKED = {
    "clock_mhz": "clocks.sm",
    "highest_clock_mhz": "clocks.max.sm",
    "power_w": "power.draw.instant",
    "power_limit_w": "enforced.power.limit",
    "limited_by_power": "clocks_event_reasons.sw_power_cap",
}
SETTLING_S = 0.5


def step_of(problem: Problem, inputs: Inputs) -> Callable[[], None]:
    """A training step of our experts."""
    leaves = [t.requires_grad_() for t in inputs.leaves().values()]
    forward = peers.fastmoe(problem)

    def step() -> None:
        forward(inputs).backward(inputs.grad)
        drop_gradients(leaves)

    return step


def sustained(call: Callable[[], None], seconds: float, device: torch.device) -> dict[str, float]:
    """Time of a call, clock and power (medians) while it is repeated for some seconds.

    `limited_by_power` is the share of the answers by which the driver held the clock down to stay
    below the power limit.
    """
    call()
    torch.cuda.synchronize()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(ASKED.values())}", "-lms", "100"]
    asking = subprocess.Popen(
        [*command, "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True
    )
    calls, started = 0, time.perf_counter()
    try:
        while (took := time.perf_counter() - started) < seconds:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            calls += 10
    finally:
        asking.terminate()
        said = asking.communicate()[0]
    return {"ms": took / calls * 1e3} | answers(said.splitlines()[int(SETTLING_S * 10) :])


def answers(lines: list[str]) -> dict[str, float]:
    """Medians of nvidia-smi's lines, e.g. "1545, 1980, 698.21, 700.00, Active".

    Raises RuntimeError where a line has something else than these five.
    """
    columns: dict[str, list[float]] = {name: [] for name in ASKED}
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        try:
            values = [*map(float, cells[:-1]), float({"Active": 1, "Not Active": 0}[cells[-1]])]
            for name, value in zip(ASKED, values, strict=True):
                columns[name].append(value)
        except (KeyError, ValueError) as e:
            raise RuntimeError(f"nvidia-smi said {line!r}, not {list(ASKED.values())}") from e
    if not columns["clock_mhz"]:
        raise RuntimeError("nvidia-smi said nothing: repeat the call for longer")
    share = statistics.fmean(columns.pop("limited_by_power"))
    return {n: statistics.median(v) for n, v in columns.items()} | {"limited_by_power": share}


def counted(tokens: int, limit: float) -> list[dict[str, object]]:
    """A row for each large kernel of a step, by ncu over a process of its own.

    Raises RuntimeError when ncu did not read the counters.
    """
    ncu = [
        "ncu",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "raw",
    ]
    ncu += ["-k", f"regex:{KERNELS}", "--metrics", ",".join(COUNTERS.values())]
    run = [sys.executable, "-m", f"{__package__}.counters", "--profiled", str(tokens)]
    done = subprocess.run([*ncu, *run], capture_output=True, text=True, timeout=limit)
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith('"')]
    if done.returncode or len(table) < 3:
        raise RuntimeError(f"ncu read no counters:\n{(done.stdout + done.stderr)[-2000:]}")
    return rows_of(table)


def rows_of(table: list[str]) -> list[dict[str, object]]:
    """Rows from ncu's raw page as CSV: names of columns, base units, a line for each kernel."""
    header, units, *kernels = csv.reader(table)
    rows = []
    for cells in kernels:
        of = dict(zip(header, cells, strict=True))
        unit = dict(zip(header, units, strict=True))
        value = {
            name: float(of[counter].replace(",", "")) * UNITS.get(unit[counter], 1.0)
            for name, counter in COUNTERS.items()
        }
        rows.append(
            {
                "kernel": of["Kernel Name"],
                "ms": value["ms"],
                "clock_mhz": value["clock"],
                "occupied": value["busy"] / value["cycles"],
                **{name: value[name] / 100 for name in ("tensor", "l2", "memory")},
            }
        )
    return rows


def _profiled(tokens: int, device: torch.device) -> None:
    """What ncu watches: one step, after two that it does not see."""
    problem = QWEN3_30B.at(tokens)
    step = step_of(problem, make_inputs(problem, torch.bfloat16, str(device)))
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=__doc__)
    parser.add_argument("--tokens", default="4096,16384", help="with commas between")
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps without a pause")
    parser.add_argument("--limit", type=float, default=120, help="seconds for ncu, each size")
    parser.add_argument("--profiled", type=int, help="tokens of one step under ncu, nothing else")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    args = parser.parse_args(argv)
    missing = [tool for tool in ("nvidia-smi", "ncu") if shutil.which(tool) is None]
    if not torch.cuda.is_available() or missing:
        needs = f"{' and '.join(missing)} on PATH" if missing else "a CUDA GPU"
        print(f"error: needs {needs} (ncu is part of the CUDA toolkit)")
        return 2
    device = torch.device("cuda")
    if args.profiled:
        _profiled(args.profiled, device)
        return 0
    rows: list[dict[str, object]] = []
    for tokens in map(int, args.tokens.split(",")):
        problem = QWEN3_30B.at(tokens)
        inputs = make_inputs(problem, torch.bfloat16, str(device))
        calls = {
            peers.OURS: step_of(problem, inputs),
            floors.DENSE: floors.dense_limit(problem, inputs)["step"],
        }
        for name, call in calls.items():
            row = sustained(call, args.seconds, device)
            rows.append({"implementation": name, "T": tokens, "kernel": None, **row})
        try:
            kernels = counted(tokens, args.limit)
        except (RuntimeError, subprocess.TimeoutExpired) as e:
            print(f"error: {e}")
            return 2
        rows += [{"implementation": peers.OURS, "T": tokens, **row} for row in kernels]
    result = {"benchmark": "counters", "mode": "counters", "dtype": "bfloat16", "rows": rows}
    report.finish(result, "counters", argv, args, device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
