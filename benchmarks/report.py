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
from pathlib import Path

import torch

from .cells import Result, Row, ms, number, status
from .environment import command, describe, device_slug
from .tables import SPREAD, TABLES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
REGION = re.compile(
    r"(?P<open><!-- table: (?P<name>[\w.-]+)(?P<short>:short)? -->\n).*?(?P<close><!-- end -->)",
    re.DOTALL,
)


def table(result: Result, short: bool = False) -> str:
    """The Markdown of one result: its table, what is missing from it, and where it comes from.

    Raises ValueError when that mode has no table of that kind.
    """
    kind = result["mode"] + ":short" * short
    if kind not in TABLES:
        raise ValueError(f"no table of kind {kind!r}; choose from {list(TABLES)}")
    absent = dict.fromkeys(
        f"{r['implementation']}: {s}" for r in result["rows"] if (s := status(r))
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
    parts += [s for s in [status(row)] if s]
    for quantity in ("forward", "step", "frozen_step", "graph", "eager", "time", "micro_batches"):
        if quantity in row:
            parts.append(f"{quantity} {ms(row, quantity)} ms")
        if f"{quantity}_error" in row:
            parts.append(f"{quantity} failed: {row[f'{quantity}_error']}")
    parts += [
        f"{k} {number(row[k])}" for k in ("saved_mib", "peak_mib", "first_step_s") if row.get(k)
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


def save(result: Result, path: Path) -> None:
    """Writes a result as load() reads it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def finish(result: Result, program: str, argv: list[str], args, device: torch.device) -> None:
    """Adds on what and by which command a result was measured, writes it to args.out, prints it."""
    said = command(f"python -m benchmarks.{program}", argv)
    result["environment"] = describe(device, said, args.commit)
    path = args.out / f"{result['mode']}-{device_slug(device)}.json"
    save(result, path)
    print(f"{table(result)}\n{path}")


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
