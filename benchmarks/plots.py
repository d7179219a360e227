"""Draws results: the step of every implementation against the limit, under expert parallelism
against the step without it, and a roofline. Needs matplotlib.

Bytes in the roofline are the least that a forward pass moves: x and the output once, every active
expert's weights once.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend is chosen first

from .floors import DENSE  # noqa: E402

SINGLE = "one GPU"  # what bench_ep calls the layer without an exchange

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def draw_all(results: Path) -> list[Path]:
    """A PNG beside each training and expert-parallel result, and one roofline per device from its
    training and decode results.
    """
    drawn = []
    by_name = {p.stem: json.loads(p.read_text()) for p in sorted(results.glob("*.json"))}
    for name, result in by_name.items():
        if result["mode"] == "ep":
            path = results / f"{name}.png"
            drawn.append(step_times(result, path, SINGLE, "our layer on one GPU, no exchange"))
        if result["mode"] != "train":
            continue
        drawn.append(step_times(result, results / f"{name}.png"))
        if result["bandwidth_gbs"]:
            device = name.removeprefix("train-")
            parts = [result] + [by_name[n] for n in (f"decode-{device}",) if n in by_name]
            drawn.append(roofline(parts, results / f"roofline-{device}.png"))
    return drawn


def _problem(row: dict) -> str:
    return f"{row['problem']}\nT={row['T']}"


def step_times(
    result: dict, path: Path, base: str = DENSE, base_label: str = "dense matmuls alone"
) -> Path:
    """Bars of step time over that of the implementation `base`, by problem and implementation, with
    the milliseconds above.
    """
    rows = [r for r in result["rows"] if "step" in r]
    problems = list(dict.fromkeys(map(_problem, rows)))
    names = [n for n in dict.fromkeys(r["implementation"] for r in rows) if n != base]
    limit = {_problem(r): r["step"]["median_ms"] for r in rows if r["implementation"] == base}
    size = (max(8, 2 + 1.5 * len(problems)), 4.5)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        own = [r for r in rows if r["implementation"] == name]
        at = [problems.index(_problem(r)) + (index - (len(names) - 1) / 2) * width for r in own]
        heights = [r["step"]["median_ms"] / limit[_problem(r)] for r in own]
        bars = axes.bar(at, heights, width, label=name)
        labels = [f"{r['step']['median_ms']:.3g}" for r in own]
        axes.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label=base_label)
    axes.set_xticks(range(len(problems)), problems, fontsize=7)
    axes.set_ylabel("step time / dashed line's  (ms above the bars)")
    axes.set_title(
        f"Experts, forward + backward, {result['dtype']}, {result['environment']['device']}",
        fontsize=10,
    )
    axes.margins(y=0.15)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def roofline(results: list[dict], path: Path) -> Path:
    """Forward TFLOP/s of every implementation over FLOPs per byte, under the measured bandwidth and
    matmul speed.
    """
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    dense = [
        r["forward_tflops"] for res in results for r in res["rows"] if r["implementation"] == DENSE
    ]
    peak, bandwidth = max(dense), results[0]["bandwidth_gbs"] / 1e3  # TFLOP/s, TB/s
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        size = ELEMENT_BYTES[result["dtype"]]
        for row in result["rows"]:
            timed = row.get("graph") if result["mode"] == "decode" else row.get("forward")
            if timed is None or row["implementation"] == DENSE:
                continue
            flops = 6 * row["T"] * row["K"] * row["H"] * row["I"]
            experts = row.get("active_experts", row["E"])
            moved = size * (2 * row["T"] * row["H"] + 3 * experts * row["H"] * row["I"])
            point = (flops / moved, flops / timed["median_ms"] / 1e9)
            points.setdefault(row["implementation"], []).append(point)
    for name, own in points.items():
        axes.scatter(*zip(*own, strict=True), label=name, s=18)
    reach = [x for own in points.values() for x, _ in own]
    xs = sorted([min(reach) / 2, peak / bandwidth, max(reach) * 2])
    roof = [min(peak, bandwidth * x) for x in xs]
    label = f"{bandwidth:.2f} TB/s and {peak:.0f} TFLOP/s, measured"
    axes.plot(xs, roof, color="black", linewidth=0.8, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved at least", ylabel="TFLOP/s")
    axes.set_title(f"Experts forward, {results[0]['dtype']}, {results[0]['environment']['device']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
