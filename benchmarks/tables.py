"""The Markdown table of each kind of result: a function of the whole result, by its `mode`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from .cells import Result, Row, figure, key, label, markdown, ms, number, percent, shape, status
from .floors import DENSE
from .peers import OURS

START = 20  # steps over which runs that train are compared, at their start and at their end
LARGE_SHARE = 0.05  # of a step, from which a peer's kernel has a line of its own


def _limits(rows: list[Row]) -> dict[tuple, Row]:
    return {key(r): r for r in rows if r["implementation"] == DENSE}


def _train(result: Result) -> str:
    limits = _limits(result["rows"])
    lines = []
    for row in result["rows"]:
        if status(row):
            continue
        limit, step = limits[key(row)]["step"], row.get("step")
        share = f"{limit['median_ms'] / step['median_ms']:.0%}" if step else "-"
        lines.append(
            [shape(row), str(row["T"]), label(row["implementation"], result)]
            + [ms(row, q) for q in ("forward", "step", "frozen_step")]
            + [figure(row, "step_tflops"), share, figure(row, "saved_mib"), figure(row, "peak_mib")]
            + [f"{row['error_ratio']:.2f}" if "error_ratio" in row else "-"]
        )
    header = ["shape (H, I, E, K)", "T", "", "forward ms", "step ms", "step, frozen weights, ms"]
    header += ["step TFLOP/s", "of the limit", "saved MiB", "peak MiB"]
    return markdown([*header, "largest error / grouped_mm's"], lines)


def _train_short(result: Result) -> str:
    """Step times side by side, milliseconds."""
    names = list(dict.fromkeys(r["implementation"] for r in result["rows"] if not status(r)))
    cells = {(key(r), r["implementation"]): r for r in result["rows"]}
    lines = []
    for case in dict.fromkeys(map(key, result["rows"])):
        rows = [cells[case, n] for n in names]
        times = [number(r["step"]["median_ms"]) if "step" in r else "-" for r in rows]
        lines.append([shape(rows[0]), str(case[1]), *times])
    return markdown(["step ms at (H, I, E, K)", "T", *(label(n, result) for n in names)], lines)


def _decode(result: Result) -> str:
    lines = []
    for row in result["rows"]:
        if status(row):
            continue
        graph, floor = row.get("graph"), row.get("floor_ms")
        share = f"{floor / graph['median_ms']:.0%}" if graph and floor else "-"
        replay = row.get("graph_error") or ms(row, "graph", 1e3)
        lines.append(
            [shape(row), str(row["T"]), str(row["active_experts"]), row["implementation"]]
            + [replay, ms(row, "eager", 1e3), number(floor * 1e3) if floor else "-", share]
        )
        lines[-1][3] = label(row["implementation"], result)
    header = ["shape (H, I, E, K)", "T", "active experts", "", "CUDA graph µs", "called µs"]
    return markdown([*header, "bandwidth floor µs", "graph at floor"], lines)


def _kernels(result: Result) -> str:
    """Ours launch by launch, and all together; of the others, the large launches, and the rest of a
    phase as one line.
    """
    lines, others, ours = [], defaultdict(list), defaultdict(list)
    for row in result["rows"]:
        if status(row):
            continue
        who = [label(row["implementation"], result), str(row["T"]), row["phase"]]
        if row["implementation"] == OURS:
            ours[tuple(who[:2])].append(row)
        elif row["share"] < LARGE_SHARE:
            others[tuple(who)].append(row)
            continue
        lines.append(
            [*who, f"`{row['kernel']}`", row["work"] or "-"]
            + [number(row["time"]["median_ms"] * 1e3), f"{row['share']:.1%}"]
            + [figure(row, "tflops"), figure(row, "gbs")]
            + [f"{row['of_floor']:.0%}" if row.get("of_floor") else "-"]
        )
    for who, rows in ours.items():
        times = [row["time"]["median_ms"] for row in rows]
        floor = sum(t * row.get("of_floor", 0) for t, row in zip(times, rows, strict=True))
        line = [*who, "step", f"{len(rows)} launches", "-", number(sum(times) * 1e3), "100%"]
        lines.append([*line, "-", "-", f"{floor / sum(times):.0%}"])
    for who, rows in others.items():
        total = sum(row["time"]["median_ms"] for row in rows)
        share = sum(row["share"] for row in rows)
        line = [*who, f"{len(rows)} launches", "-", number(total * 1e3), f"{share:.1%}"]
        lines.append([*line, "-", "-", "-"])
    header = ["", "T", "phase", "kernel", "work", "µs", "share of step"]
    return markdown([*header, "TFLOP/s", "GB/s", "at floor"], lines)


def _first_step(result: Result) -> str:
    lines = []
    for row in result["rows"]:
        if status(row):
            continue
        stalls = sorted(c["first_ms"] - c["later_ms"] for c in row["counts"])
        lines.append(
            [label(row["implementation"], result), row["caches"]]
            + [
                figure(row, k)
                for k in ("import_s", "first_step_s", "to_end_of_first_step_s", "steady_ms")
            ]
            + [str(len(stalls)), number(stalls[len(stalls) // 2]), number(stalls[-1])]
        )
    header = ["", "caches", "import s", "first step s", "start to end of first step s"]
    header += ["steady step ms", "unseen token counts", "median stall ms", "worst stall ms"]
    return markdown(header, lines)


def _ep(result: Result) -> str:
    """Expert parallelism: EP implementations, and our own layer without EP on the same rows."""
    lines = []
    for row in result["rows"]:
        if status(row):
            continue
        lines.append(
            [shape(row | {"skew": 0}), str(row["T"]), _ep_label(row["implementation"])]
            + [ms(row, "forward"), ms(row, "step"), ms(row, "graph", 1e3)]
            + [figure(row, "saved_mib"), figure(row, "peak_mib")]
            + [str(row.get(k, "-")) for k in ("waits_forward", "waits_step")]
        )
    header = ["shape (H, I, E, K)", "T per rank", "", "forward ms", "step ms"]
    header += ["no gradients, CUDA graph µs", "saved MiB", "peak MiB"]
    return markdown([*header, "host waits, forward", "host waits, step"], lines)


def _ep_label(name: str) -> str:
    if name == "transformers":
        return "AllToAllEP + grouped_mm"
    return "fastmoe, one GPU, no EP" if name == "one GPU" else f"**fastmoe**, {name}"


def _sequence(result: Result) -> str:
    """A step of one sequence over all ranks beside a step of one on each rank."""
    alone = {r["T"]: r for r in result["rows"] if r["sp_size"] == 1}
    lines = []
    for row in result["rows"]:
        one = alone[row["T"]]
        share = row["step"]["median_ms"] / one["step"]["median_ms"]
        cells = [str(row["T"]), str(row["sp_size"]), ms(row, "step"), f"{share:.2f}"]
        cells += [figure(row, "activations_gib")]
        kept = row["activations_gib"]
        cells.append(f"{kept / one['activations_gib']:.2f}" if kept else "-")
        lines.append([*cells, figure(row, "peak_gib"), f"{row['tokens_per_s']:,.0f}"])
    measured = {row["T"] for row in result["rows"]}
    for step in result.get("longest", {}).get("steps", []):
        if step["T"] not in measured:
            took, rate = number(step["step_s"] * 1e3), f"{step['T'] / step['step_s']:,.0f}"
            cells = [str(step["T"]), str(result["longest"]["sp_size"]), f"{took}, once"]
            lines.append([*cells, "-", "-", "-", figure(step, "peak_gib"), rate])
    header = ["tokens", "sp_size", "step ms", "of sp_size 1", "activations GiB", "of sp_size 1"]
    return markdown([*header, "peak over weights GiB", "tokens/s"], lines)


def _upkeep(result: Result) -> str:
    """What the check of every step costs, and what a checkpoint does."""
    lines = []
    for row in result["rows"]:
        if row["what"] == "finite check":
            what = f"check of every step, {row['layers']} layers, {row['micro_batches']} x "
            cells = [what + f"{row['T']} tokens", number(row["step"]["median_ms"])]
            lines.append([*cells, number(row["check_ms"]), f"{row['share']:.1%}", "-"])
        else:
            way = "in the background" if row["asynchronous"] else "at once"
            cells = [f"saving {number(row['gib'])} GiB {way}", number(row["step_ms"])]
            lost, there = number(row["training_lost_ms"]), number(row["there_after_ms"] / 1e3)
            lines.append([*cells, f"{lost}, {number(row['stall_ms'])} of it at once", "-", there])
    header = ["", "step ms", "costs training ms", "of the step", "there after s"]
    return markdown(header, lines)


def _stability(result: Result) -> str:
    """Two runs from one start: whether all was finite, and their losses over steps both have."""
    common = min(len(row["loss"]) for row in result["rows"])
    parts = slice(0, min(START, common)), slice(max(common - START, 0), common)
    lines = []
    for row in result["rows"]:
        losses = row["loss"]
        all_finite = all(map(math.isfinite, [*losses, *row["gradient_norm"]]))
        cells = [row["run"], f"{len(losses)} of {result['steps']}"]
        cells += [row.get("not_finite", "yes" if all_finite else "no"), number(losses[0])]
        cells += [number(sum(losses[part]) / len(losses[part])) for part in parts]
        cells += [figure(row, "step_ms"), percent(row, "check_share"), figure(row, "peak_gib")]
        lines.append(cells)
    header = ["weights and states", "steps", "all finite", "first loss"]
    header += [f"mean of steps {part.start + 1}-{part.stop}" for part in parts]
    return markdown([*header, "step ms", "check of the step", "peak GiB"], lines)


def _plan(result: Result) -> str:
    """What `hf-moe-ep plan` says of a layout beside what a training step of it takes."""
    lines = []
    for row in result["rows"]:
        layout = ", ".join(f"{k}={v}" for k, v in row["layout"].items()) or "one GPU"
        checkpointing = "yes" if row["checkpointing"] else "no"
        lines.append(
            [str(result["layers"]), layout, str(row["tokens"]), str(row["micro_batches"])]
            + [checkpointing, figure(row, "peak_gib"), figure(row, "planned_gib")]
            + [number(row["step_s"]), number(row["planned_s"])]
            + [f"{row['tokens_per_s']:,.0f}", percent(row, "mfu")]
        )
    header = ["layers", "layout", "tokens of a rank", "micro-batches", "checkpointing"]
    header += ["peak GiB", "planned GiB", "step s", "planned s", "tokens/s", "MFU"]
    return markdown(header, lines)


def _random(result: Result) -> str:
    """Random problems: how many passed, and the largest error as a share of what is allowed."""
    lines = [
        [r["dtype"], str(r["problems"]), str(r["passed"]), figure(r, "used"), r["where"]]
        for r in result["rows"]
    ]
    header = ["dtype", "problems", "passed", "largest error / allowed", "in"]
    return markdown(header, lines)


def _sanitize(result: Result) -> str:
    """What compute-sanitizer found, and in which kernels."""
    lines = []
    for row in result["rows"]:
        places = ", ".join(f"`{k}` {n}" for k, n in row["kernels"].items()) or "-"
        lines.append([row["tool"], str(row["errors"]), str(row["warnings"]), places])
    return markdown(["compute-sanitizer", "errors", "warnings", "in"], lines)


def _counters(result: Result) -> str:
    """Clock and power of steps without a pause, then what the counters say of single kernels."""
    steps, kernels = [], []
    for row in result["rows"]:
        if row["kernel"] is None:
            cells = [label(row["implementation"], result), str(row["T"]), number(row["ms"])]
            cells += [f"{row['clock_mhz']:.0f} of {row['highest_clock_mhz']:.0f}"]
            cells += [f"{row['power_w']:.0f} of {row['power_limit_w']:.0f}"]
            steps.append([*cells, f"{row['limited_by_power']:.0%}"])
        else:
            cells = [str(row["T"]), f"`{row['kernel']}`", number(row["ms"] * 1e3)]
            cells += [f"{row['clock_mhz']:.0f}"]
            shares = (row[k] for k in ("occupied", "tensor", "l2", "memory"))
            kernels.append([*cells, *(f"{share:.0%}" for share in shares)])
    header = ["", "T", "ms a step", "clock MHz", "power W", "clock held down by the power limit"]
    first = markdown(header, steps)
    header = ["T", "kernel", "µs", "clock MHz", "multiprocessors occupied", "tensor cores busy"]
    return first + "\n\n" + markdown([*header, "L2", "memory"], kernels)


def _sft(result: Result) -> str:
    """Whole models through `hf-moe-ep sft`; how many times as fast as the first row."""
    rows = [row for row in result["rows"] if not status(row)]
    lines = []
    for row in rows:
        name = row["implementation"]
        ours = name.startswith(("fastmoe", "recipe"))
        faster = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        lines.append(
            [str(row["layers"]), str(row["gpus"]), f"**{name}**" if ours else name]
            + [f"{row['tokens_per_step']:,}", ms(row, "step"), f"{row['tokens_per_s']:,.0f}"]
            + [f"{faster:.2f}", percent(row, "mfu")]
            + [figure(row, "peak_gib")]
        )
    header = ["layers", "GPUs", "", "tokens per step", "step ms", "tokens/s", "of the first row"]
    return markdown([*header, "MFU", "peak GiB"], lines)


def _generate(result: Result) -> str:
    """generate() with only the experts exchanged."""
    names = {"grouped_mm": "grouped_mm; decodes by batched_mm"}
    names |= {"grouped_mm_in_decode": "grouped_mm throughout"}
    lines = []
    for row in result["rows"]:
        if status(row):
            continue
        experts = names.get(row["implementation"], label(row["implementation"], result))
        lines.append(
            [str(row["batch"]), str(row["prompt"]), str(row["new"]), row["cache"], experts]
            + [f"{row['tokens_per_s']:,.1f}", number(row["ms_per_step"]), number(row["first_s"])]
        )
    header = ["sequences", "prompt", "new tokens", "cache", "experts", "tokens/s", "ms a token"]
    return markdown([*header, "first call s"], lines)


def _router(result: Result) -> str:
    """A decoder layer's parts, and what its sparse block spends around the experts."""
    lines = []
    for row in result["rows"]:
        cells = [row["part"], number(row["forward_ms"]), f"{row['share']['forward']:.1%}"]
        lines.append([*cells, number(row["step_ms"]), f"{row['share']['step']:.1%}"])
    header = [f"{result['tokens']} tokens", "forward ms", "of the layer"]
    return markdown([*header, "forward + backward ms", "of the layer"], lines)


def _optimizer(result: Result) -> str:
    """Passes over all weights, ours and torch's."""
    lines = []
    for row in result["rows"]:
        who = label(row["implementation"], result)
        lines.append([row["pass"], who, ms(row, "time"), number(row["gbs"])])
    return markdown([f"{result['weights']:,} weights", "", "ms", "GB/s"], lines)


def _accumulate(result: Result) -> str:
    """Experts that keep their input alone beside the others; then ways to add up micro-batches."""
    lean, ways = [], []
    base = {key(r): r for r in result["rows"] if r["implementation"] == "fastmoe" and "step" in r}
    alone = {key(r): r for r in result["rows"] if r.get("way") == "no accumulation"}
    for row in result["rows"]:
        cells = [shape(row), str(row["T"])]
        if "micro_batches" in row:
            spent = row["micro_batches"]["median_ms"]
            over = spent - alone[key(row)]["micro_batches"]["median_ms"]
            errors = row.get("sum_errors", {}).values()
            cells += [row["way"], ms(row, "micro_batches"), number(over), figure(row, "peak_mib")]
            ways.append([*cells, number(max(errors)) if errors else "-"])
        elif "step" in row and row["implementation"] != DENSE:
            share = row["step"]["median_ms"] / base[key(row)]["step"]["median_ms"]
            cells += [label(row["implementation"], result), ms(row, "forward"), ms(row, "step")]
            memory = [figure(row, "saved_mib"), figure(row, "peak_mib")]
            lean.append([*cells, f"{share:.2f}", *memory])
    header = ["shape (H, I, E, K)", "T", "", "forward ms", "step ms", "of fastmoe's"]
    first = markdown([*header, "saved MiB beside x", "peak MiB"], lean)
    header = ["shape (H, I, E, K)", "T", "8 micro-batches", "ms", "ms for adding up", "peak MiB"]
    return first + "\n\n" + markdown([*header, "error of the sum"], ways)


TABLES: dict[str, Callable[[Result], str]] = {
    "train": _train,
    "train:short": _train_short,
    "decode": _decode,
    "kernels": _kernels,
    "first_step": _first_step,
    "ep": _ep,
    "plan": _plan,
    "sequence": _sequence,
    "stability": _stability,
    "upkeep": _upkeep,
    "sft": _sft,
    "random": _random,
    "sanitize": _sanitize,
    "counters": _counters,
    "generate": _generate,
    "router": _router,
    "optimizer": _optimizer,
    "accumulate": _accumulate,
}


SPREAD = (
    "train",
    "decode",
    "accumulate",
    "ep",
    "sequence",
    "sft",
    "optimizer",
)  # the tables that show one
