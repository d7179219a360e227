"""Makes Markdown tables and plots from results/*.json, and keeps the tables in the documentation
equal to them.

A document marks the place with two comments, `table: NAME` or `table: NAME:short` and `end`, where
NAME is the JSON file's without its ending. `python -m benchmarks.report` rewrites what lies
between; with --check it only compares.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .floors import DENSE

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
REGION = re.compile(
    r"(?P<open><!-- table: (?P<name>[\w.-]+)(?P<short>:short)? -->\n).*?(?P<close><!-- end -->)",
    re.DOTALL,
)
Result = dict
Row = dict


# --- cells ---


def _shape(row: Row) -> str:
    skew = f", Zipf {row['skew']:g}" if row["skew"] else ""
    sizes = ", ".join(str(row[k]) for k in "HIEK")
    return f"{row['problem'].removesuffix('-zipf')} ({sizes}){skew}"


def _number(value: float) -> str:
    """Three significant digits, e.g. 0.0312, 7.46, 1795; below a thousandth e.g. 1.6e-07."""
    if value == 0 or value != value:
        return "0" if value == 0 else "NaN"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 0
    while abs(value) * 10**digits < 99.95 and digits < 6:
        digits += 1
    return f"{value:.{digits}f}"


def _ms(row: Row, quantity: str, factor: float = 1.0) -> str:
    """Median, with the 10th and 90th percentile in brackets; why there is none otherwise."""
    s = row.get(quantity)
    if s is None:
        return "failed" if f"{quantity}_error" in row else "-"
    median, p10, p90 = (_number(s[k] * factor) for k in ("median_ms", "p10_ms", "p90_ms"))
    return f"{median} ({p10}-{p90})"


def _get(row: Row, key: str) -> str:
    return "-" if row.get(key) is None else _number(row[key])


def _label(name: str, result: Result) -> str:
    if name != DENSE:
        return f"**{name}**" if name == "fastmoe" else name
    return "cuBLAS limit" if result["environment"]["cuda"] else "dense matmul limit"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


# --- tables ---


def _status(row: Row) -> str | None:
    """Why an implementation has no figures, or None when it has."""
    if "not_available" in row:
        return f"not available: {row['not_available']}"
    if "wrong" in row:
        return "wrong, so not timed: " + "; ".join(row["wrong"])
    return f"failed: {row['error']}" if "error" in row else None


def _limits(rows: list[Row]) -> dict[tuple, Row]:
    return {_key(r): r for r in rows if r["implementation"] == DENSE}


def _key(row: Row) -> tuple[str, int]:
    return row["problem"], row["T"]


def _train(result: Result) -> str:
    limits = _limits(result["rows"])
    lines = []
    for row in result["rows"]:
        if _status(row):
            continue
        limit, step = limits[_key(row)]["step"], row.get("step")
        share = f"{limit['median_ms'] / step['median_ms']:.0%}" if step else "-"
        lines.append(
            [_shape(row), str(row["T"]), _label(row["implementation"], result)]
            + [_ms(row, q) for q in ("forward", "step", "frozen_step")]
            + [_get(row, "step_tflops"), share, _get(row, "saved_mib"), _get(row, "peak_mib")]
            + [f"{row['error_ratio']:.2f}" if "error_ratio" in row else "-"]
        )
    header = ["shape (H, I, E, K)", "T", "", "forward ms", "step ms", "step, frozen weights, ms"]
    header += [
        "step TFLOP/s",
        "of the limit",
        "saved MiB",
        "peak MiB",
        "largest error / grouped_mm's",
    ]
    return _markdown(header, lines)


def _train_short(result: Result) -> str:
    """Step times side by side, milliseconds."""
    names = list(dict.fromkeys(r["implementation"] for r in result["rows"] if not _status(r)))
    cells = {(_key(r), r["implementation"]): r for r in result["rows"]}
    lines = []
    for key in dict.fromkeys(map(_key, result["rows"])):
        rows = [cells[key, n] for n in names]
        times = [_number(r["step"]["median_ms"]) if "step" in r else "-" for r in rows]
        lines.append([_shape(rows[0]), str(key[1]), *times])
    return _markdown(["step ms at (H, I, E, K)", "T", *(_label(n, result) for n in names)], lines)


def _decode(result: Result) -> str:
    lines = []
    for row in result["rows"]:
        if _status(row):
            continue
        graph, floor = row.get("graph"), row.get("floor_ms")
        share = f"{floor / graph['median_ms']:.0%}" if graph and floor else "-"
        replay = row.get("graph_error") or _ms(row, "graph", 1e3)
        lines.append(
            [_shape(row), str(row["T"]), str(row["active_experts"]), row["implementation"]]
            + [replay, _ms(row, "eager", 1e3), _number(floor * 1e3) if floor else "-", share]
        )
        lines[-1][3] = _label(row["implementation"], result)
    header = ["shape (H, I, E, K)", "T", "active experts", "", "CUDA graph µs", "called µs"]
    return _markdown([*header, "bandwidth floor µs", "graph at floor"], lines)


def _kernels(result: Result) -> str:
    lines = []
    for row in result["rows"]:
        if _status(row):
            continue
        lines.append(
            [
                _label(row["implementation"], result),
                str(row["T"]),
                row["phase"],
                f"`{row['kernel']}`",
            ]
            + [row["work"] or "-", _number(row["time"]["median_ms"] * 1e3), f"{row['share']:.1%}"]
            + [_get(row, "tflops"), _get(row, "gbs")]
            + [f"{row['of_floor']:.0%}" if row.get("of_floor") else "-"]
        )
    header = [
        "",
        "T",
        "phase",
        "kernel",
        "work",
        "µs",
        "share of step",
        "TFLOP/s",
        "GB/s",
        "at floor",
    ]
    return _markdown(header, lines)


def _first_step(result: Result) -> str:
    lines = []
    for row in result["rows"]:
        if _status(row):
            continue
        stalls = sorted(c["first_ms"] - c["later_ms"] for c in row["counts"])
        lines.append(
            [_label(row["implementation"], result), row["caches"]]
            + [
                _get(row, k)
                for k in ("import_s", "first_step_s", "to_end_of_first_step_s", "steady_ms")
            ]
            + [str(len(stalls)), _number(stalls[len(stalls) // 2]), _number(stalls[-1])]
        )
    header = [
        "",
        "caches",
        "import s",
        "first step s",
        "start to end of first step s",
        "steady step ms",
    ]
    header += ["unseen token counts", "median stall ms", "worst stall ms"]
    return _markdown(header, lines)


def _ep(result: Result) -> str:
    """Expert parallelism: EP implementations, and our own layer without EP on the same rows."""
    lines = []
    for row in result["rows"]:
        if _status(row):
            continue
        lines.append(
            [_shape(row | {"skew": 0}), str(row["T"]), _ep_label(row["implementation"])]
            + [_ms(row, "forward"), _ms(row, "step"), _ms(row, "graph", 1e3)]
            + [_get(row, "saved_mib"), _get(row, "peak_mib")]
            + [str(row.get(k, "-")) for k in ("waits_forward", "waits_step")]
        )
    header = ["shape (H, I, E, K)", "T per rank", "", "forward ms", "step ms"]
    header += ["no gradients, CUDA graph µs", "saved MiB", "peak MiB"]
    return _markdown([*header, "host waits, forward", "host waits, step"], lines)


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
        cells = [str(row["T"]), str(row["sp_size"]), _ms(row, "step"), f"{share:.2f}"]
        cells += [_get(row, "activations_gib")]
        kept = row["activations_gib"]
        cells.append(f"{kept / one['activations_gib']:.2f}" if kept else "-")
        lines.append([*cells, _get(row, "peak_gib"), f"{row['tokens_per_s']:,.0f}"])
    measured = {row["T"] for row in result["rows"]}
    for step in result.get("longest", {}).get("steps", []):
        if step["T"] not in measured:
            ms, rate = _number(step["step_s"] * 1e3), f"{step['T'] / step['step_s']:,.0f}"
            cells = [str(step["T"]), str(result["longest"]["sp_size"]), f"{ms}, once"]
            lines.append([*cells, "-", "-", "-", _get(step, "peak_gib"), rate])
    header = ["tokens", "sp_size", "step ms", "of sp_size 1", "activations GiB", "of sp_size 1"]
    return _markdown([*header, "peak over weights GiB", "tokens/s"], lines)


def _upkeep(result: Result) -> str:
    """What the check of every step costs, and what a checkpoint does."""
    lines = []
    for row in result["rows"]:
        if row["what"] == "finite check":
            what = f"check of every step, {row['layers']} layers, {row['micro_batches']} x "
            cells = [what + f"{row['T']} tokens", _number(row["step"]["median_ms"])]
            lines.append([*cells, _number(row["check_ms"]), f"{row['share']:.1%}", "-"])
        else:
            way = "in the background" if row["asynchronous"] else "at once"
            cells = [f"saving {_number(row['gib'])} GiB {way}", _number(row["step_ms"])]
            lost, there = _number(row["training_lost_ms"]), _number(row["there_after_ms"] / 1e3)
            lines.append([*cells, f"{lost}, {_number(row['stall_ms'])} of it at once", "-", there])
    header = ["", "step ms", "costs training ms", "of the step", "there after s"]
    return _markdown(header, lines)


def _stability(result: Result) -> str:
    """Two runs from one start: their losses, and that nothing was not finite."""
    lines = []
    for row in result["rows"]:
        losses = row["loss"]
        cells = [row["run"], f"{len(losses)} of {result['steps']}", _number(losses[0])]
        cells += [_number(sum(losses[part]) / len(losses[part])) for part in STABILITY_PARTS]
        cells += [row.get("not_finite", "none")]
        lines.append([*cells, _get(row, "step_ms"), _get(row, "peak_gib")])
    header = ["weights and states", "steps", "first loss", "mean of the first 20"]
    header += ["mean of the last 20", "not finite", "step ms", "peak GiB"]
    return _markdown(header, lines)


STABILITY_PARTS = (slice(20), slice(-20, None))


def _plan(result: Result) -> str:
    """What `hf-moe-ep plan` says of a layout beside what a training step of it takes."""
    lines = []
    for row in result["rows"]:
        layout = ", ".join(f"{k}={v}" for k, v in row["layout"].items()) or "one GPU"
        checkpointing = "yes" if row["checkpointing"] else "no"
        lines.append(
            [str(result["layers"]), layout, str(row["tokens"]), str(row["micro_batches"])]
            + [checkpointing, _get(row, "peak_gib"), _get(row, "planned_gib")]
            + [_number(row["step_s"]), _number(row["planned_s"])]
            + [f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}"]
        )
    header = ["layers", "layout", "tokens of a rank", "micro-batches", "checkpointing"]
    header += ["peak GiB", "planned GiB", "step s", "planned s", "tokens/s", "MFU"]
    return _markdown(header, lines)


def _random(result: Result) -> str:
    """Random problems: how many passed, and the largest error as a share of what is allowed."""
    lines = [
        [r["dtype"], str(r["problems"]), str(r["passed"]), _get(r, "used"), r["where"]]
        for r in result["rows"]
    ]
    header = ["dtype", "problems", "passed", "largest error / allowed", "in"]
    return _markdown(header, lines)


def _sanitize(result: Result) -> str:
    """What compute-sanitizer found, and in which kernels."""
    lines = []
    for row in result["rows"]:
        places = ", ".join(f"`{k}` {n}" for k, n in row["kernels"].items()) or "-"
        lines.append([row["tool"], str(row["errors"]), str(row["warnings"]), places])
    return _markdown(["compute-sanitizer", "errors", "warnings", "in"], lines)


def _sft(result: Result) -> str:
    """Whole models through `hf-moe-ep sft`; how many times as fast as the first row."""
    rows = [row for row in result["rows"] if not _status(row)]
    lines = []
    for row in rows:
        label = row["implementation"]
        ours = label.startswith(("fastmoe", "recipe"))
        faster = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        lines.append(
            [str(row["layers"]), str(row["gpus"]), f"**{label}**" if ours else label]
            + [f"{row['tokens_per_step']:,}", _ms(row, "step"), f"{row['tokens_per_s']:,.0f}"]
            + [f"{faster:.2f}", f"{row['mfu']:.1%}" if row.get("mfu") else "-"]
            + [_get(row, "peak_gib")]
        )
    header = ["layers", "GPUs", "", "tokens per step", "step ms", "tokens/s", "of the first row"]
    return _markdown([*header, "MFU", "peak GiB"], lines)


def _generate(result: Result) -> str:
    """generate() with only the experts exchanged."""
    names = {"grouped_mm": "grouped_mm; decodes by batched_mm"}
    names |= {"grouped_mm_in_decode": "grouped_mm throughout"}
    lines = []
    for row in result["rows"]:
        if _status(row):
            continue
        label = names.get(row["implementation"], _label(row["implementation"], result))
        lines.append(
            [str(row["batch"]), str(row["prompt"]), str(row["new"]), row["cache"], label]
            + [f"{row['tokens_per_s']:,.1f}", _number(row["ms_per_step"]), _number(row["first_s"])]
        )
    header = ["sequences", "prompt", "new tokens", "cache", "experts", "tokens/s", "ms a token"]
    return _markdown([*header, "first call s"], lines)


def _router(result: Result) -> str:
    """A decoder layer's parts, and what its sparse block spends around the experts."""
    lines = []
    for row in result["rows"]:
        cells = [row["part"], _number(row["forward_ms"]), f"{row['share']['forward']:.1%}"]
        lines.append([*cells, _number(row["step_ms"]), f"{row['share']['step']:.1%}"])
    header = [f"{result['tokens']} tokens", "forward ms", "of the layer"]
    return _markdown([*header, "forward + backward ms", "of the layer"], lines)


def _accumulate(result: Result) -> str:
    """Experts that keep their input alone beside the others; then ways to add up micro-batches."""
    lean, ways = [], []
    base = {_key(r): r for r in result["rows"] if r["implementation"] == "fastmoe" and "step" in r}
    alone = {_key(r): r for r in result["rows"] if r.get("way") == "no accumulation"}
    for row in result["rows"]:
        cells = [_shape(row), str(row["T"])]
        if "micro_batches" in row:
            spent = row["micro_batches"]["median_ms"]
            over = spent - alone[_key(row)]["micro_batches"]["median_ms"]
            errors = row.get("sum_errors", {}).values()
            cells += [row["way"], _ms(row, "micro_batches"), _number(over), _get(row, "peak_mib")]
            ways.append([*cells, _number(max(errors)) if errors else "-"])
        elif "step" in row and row["implementation"] != DENSE:
            share = row["step"]["median_ms"] / base[_key(row)]["step"]["median_ms"]
            cells += [_label(row["implementation"], result), _ms(row, "forward"), _ms(row, "step")]
            memory = [_get(row, "saved_mib"), _get(row, "peak_mib")]
            lean.append([*cells, f"{share:.2f}", *memory])
    header = ["shape (H, I, E, K)", "T", "", "forward ms", "step ms", "of fastmoe's"]
    first = _markdown([*header, "saved MiB beside x", "peak MiB"], lean)
    header = ["shape (H, I, E, K)", "T", "8 micro-batches", "ms", "ms for adding up", "peak MiB"]
    return first + "\n\n" + _markdown([*header, "error of the sum"], ways)


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
    "generate": _generate,
    "router": _router,
    "accumulate": _accumulate,
}


SPREAD = ("train", "decode", "accumulate", "ep", "sequence", "sft")  # the tables that show one


def table(result: Result, short: bool = False) -> str:
    """The Markdown of one result: its table, what is missing from it, and where it comes from.

    Raises ValueError when that mode has no table of that kind.
    """
    kind = result["mode"] + ":short" * short
    if kind not in TABLES:
        raise ValueError(f"no table of kind {kind!r}; choose from {list(TABLES)}")
    absent = dict.fromkeys(
        f"{r['implementation']}: {s}" for r in result["rows"] if (s := _status(r))
    )
    spread = " Medians, in brackets the 10th and 90th percentile." if kind in SPREAD else ""
    return "\n\n".join([TABLES[kind](result), *absent, _provenance(result, spread)])


def _provenance(result: Result, spread: str) -> str:
    env = result["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["packages"].items())
    driver = f", driver {env['driver']}" if env["driver"] else ""
    bandwidth = result.get("bandwidth_gbs")
    streamed = f" Memory bandwidth measured: {bandwidth:.0f} GB/s." if bandwidth else ""
    return (
        f"{env['device']}{driver}, {versions}, {result['dtype']}, {env['date'][:10]}, "
        f"commit {env['commit']}.{spread}"
        f"{streamed} `{env['command']}`"
    )


def one_line(row: Row) -> str:
    """A row as a line of progress."""
    parts = [row["problem"], f"T={row['T']}", row["implementation"]]
    parts += [row[k] for k in ("caches", "phase", "kernel", "way") if k in row]
    parts += [s for s in [_status(row)] if s]
    for quantity in ("forward", "step", "frozen_step", "graph", "eager", "time", "micro_batches"):
        if quantity in row:
            parts.append(f"{quantity} {_ms(row, quantity)} ms")
        if f"{quantity}_error" in row:
            parts.append(f"{quantity} failed: {row[f'{quantity}_error']}")
    parts += [
        f"{k} {_number(row[k])}" for k in ("saved_mib", "peak_mib", "first_step_s") if row.get(k)
    ]
    return "  ".join(parts)


# --- documents ---


def load(name: str, results: Path = RESULTS) -> Result:
    """Raises ValueError when there is no such result."""
    path = results / f"{name}.json"
    if not path.exists():
        raise ValueError(
            f"no result {path}; there are {sorted(p.stem for p in results.glob('*.json'))}"
        )
    return json.loads(path.read_text())


def rewritten(text: str, results: Path = RESULTS) -> str:
    """A document's text with every marked table made anew."""

    def region(match: re.Match) -> str:
        body = table(load(match["name"], results), short=match["short"] is not None)
        return f"{match['open']}{body}\n{match['close']}"

    return REGION.sub(region, text)


def documents(root: Path = HERE.parent) -> list[Path]:
    """The Markdown files of the checkout that may hold tables."""
    patterns = ("*.md", "docs/**/*.md", "benchmarks/*.md", "kernel_repo/*.md")
    return sorted(p for pattern in patterns for p in root.glob(pattern))


def main(argv: list[str]) -> int:
    """Rewrite the tables and plots; with --check, only name the documents that differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 on a difference")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the checkout")
    args = parser.parse_args(argv)
    results = args.root / "benchmarks" / "results"
    stale = []
    for path in documents(args.root):
        old = path.read_text()
        new = rewritten(old, results)
        if new != old:
            stale.append(path)
            if not args.check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'differs from' if args.check else 'rewritten from'} the results")
    if args.check:
        return int(bool(stale))
    from .plots import draw_all  # matplotlib is needed for the plots alone

    for path in draw_all(results):
        print(f"{path}: drawn")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
