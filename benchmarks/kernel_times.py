"""Takes a training step apart into its kernel launches, by the GPU's own clock (CUPTI through
torch.profiler).

A step launches the same kernels in the same order every time, so the n-th launch of each step is
one line. What a kernel of ours has to do at least, in FLOPs or bytes, stands in `work_of`; S = T*K
routed rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch.autograd import DeviceType

from . import floors
from .layer import Row, Settings, admit, new_row
from .problems import Problem, make_inputs
from .timing import drop_gradients, interleave, spread

STEPS = 10


@dataclass(frozen=True)
class Work:
    """What one launch has to do."""

    what: str  # a GEMM of floors.dense_gemms, or words, e.g. "sum over slots"
    flops: int = 0  # of the GEMM, e.g. 824633720832
    nbytes: int = 0  # least traffic: every operand read once, every result written, e.g. 603979776


def work_of(problem: Problem, element: int) -> dict[tuple[str, int], Work]:
    """The work of our kernels in a training step, by name and by which launch of that name it is,
    from 0.

    `element` is the size of an activation in bytes.
    """
    p, s = problem, problem.T * problem.K
    small, large = 2 * s * p.H * p.I, 2 * s * p.H * 2 * p.I  # GEMMs with I and with 2I
    tokens, rows, gate = (element * n for n in (p.T * p.H, s * p.H, s * 2 * p.I))  # x, y, h
    inner = gate // 2  # a
    down = element * p.E * p.H * p.I
    summed = Work("sum over slots", nbytes=rows + tokens)
    return {
        ("count_kernel", 0): Work("tokens per expert", nbytes=8 * s),
        ("place_kernel", 0): Work("rows and tiles", nbytes=(8 + 4 + 4) * s),
        ("up_gate_kernel", 0): Work("up", large, tokens + 2 * down + gate + inner),
        ("grouped_linear_kernel", 0): Work("down", small, inner + down + rows),
        ("combine_kernel", 0): summed,
        ("gate_backward_kernel", 0): Work(
            "down input gradient", small, tokens + down + gate + gate + inner
        ),
        ("routing_weight_grad_kernel", 0): Work("sum of dots", nbytes=(4 + 4 + element) * s),
        ("weight_grad_kernel", 0): Work("down weight gradient", small, tokens + inner + down),
        ("grouped_linear_kernel", 1): Work("up input gradient", large, gate + 2 * down + rows),
        ("combine_kernel", 1): summed,
        ("weight_grad_kernel", 1): Work("up weight gradient", large, tokens + gate + 2 * down),
    }


def measure(problem: Problem, settings: Settings) -> list[Row]:
    """One row per launch of a training step, for each implementation that passes the gate. Needs a
    CUDA GPU.
    """
    inputs = make_inputs(problem, settings.dtype, str(settings.device))
    rows, admitted = admit(problem, inputs, settings, gradients=True)
    refused = [row for name, row in rows.items() if name not in admitted]
    leaves = list(inputs.leaves().values())
    gemms = floors.dense_gemms(problem, inputs)
    gemm_ms = interleave(gemms, settings.device, settings.seconds)
    lines = []
    for name, forward in admitted.items():

        def step(forward=forward) -> None:
            forward(inputs).backward(inputs.grad)
            drop_gradients(leaves)

        in_forward = len(launches(lambda f=forward: f(inputs)))
        found = launches(step)
        for row in rows_of(found, in_forward, work_of(problem, inputs.x.element_size())):
            _add_floor(row, {k: v.median_ms for k, v in gemm_ms.items()}, settings.bandwidth)
            lines.append(new_row(problem, name) | row)
    return refused + lines


def launches(call: Callable[[], object], steps: int = STEPS) -> list[tuple[str, list[float]]]:
    """Name and times (ms) of every kernel that `call` launches, in order, over `steps` calls.

    Raises RuntimeError when two calls do not launch the same kernels.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return in_steps([(e.name, e.time_range.elapsed_us() / 1e3) for e in events], steps)


def in_steps(events: list[tuple[str, float]], steps: int) -> list[tuple[str, list[float]]]:
    """The events of `steps` equal steps, put together by their place in the step.

    E.g. [("a", 1), ("b", 5), ("a", 2), ("b", 6)] in 2 steps is [("a", [1, 2]), ("b", [5, 6])].
    """
    size, rest = divmod(len(events), steps)
    same = (
        all(e[0] == events[i % size][0] for i, e in enumerate(events))
        if not rest and size
        else False
    )
    if not same:
        counts = dict(Counter(name for name, _ in events))
        raise RuntimeError(f"{steps} steps did not launch the same kernels each time: {counts}")
    return [(events[i][0], [ms for _, ms in events[i::size]]) for i in range(size)]


def rows_of(
    found: list[tuple[str, list[float]]], in_forward: int, work: dict[tuple[str, int], Work]
) -> list[Row]:
    """Phase, kernel, work, time and rate of each launch. Kernels that are not in `work` have a time
    only.
    """
    total = sum(spread(ms).median_ms for _, ms in found)
    seen: Counter[str] = Counter()
    rows = []
    for index, (name, ms) in enumerate(found):
        own, time = work.get((name, seen[name])), spread(ms)
        seen[name] += 1
        row = {
            "phase": "forward" if index < in_forward else "backward",
            "kernel": name if len(name) <= 60 else name[:57] + "...",
            "work": own.what if own else None,
            "time": asdict(time),
            "share": time.median_ms / total,
            "tflops": own.flops / time.median_ms / 1e9 if own and own.flops else None,
            "gbs": own.nbytes / time.median_ms / 1e6 if own and own.nbytes else None,
        }
        rows.append(row)
    return rows


def _add_floor(row: Row, gemm_ms: dict[str, float], bandwidth: float | None) -> None:
    """The share of the floor: the least traffic at the measured bandwidth, or for a GEMM the dense
    matmul's time where that is longer, over the kernel's time.
    """
    shares = []
    if row["tflops"]:
        shares.append(gemm_ms[row["work"]] / row["time"]["median_ms"])
    if row["gbs"] and bandwidth:
        shares.append(row["gbs"] * 1e9 / bandwidth)
    if shares:
        row["of_floor"] = max(shares)
