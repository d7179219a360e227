"""What the cells of the tables and the lines of progress say of a result's rows."""

from __future__ import annotations

from .floors import DENSE

Result = dict
Row = dict


def shape(row: Row) -> str:
    """The problem's name and sizes, e.g. "qwen3-30b-a3b (2048, 768, 128, 8)"."""
    skew = f", Zipf {row['skew']:g}" if row["skew"] else ""
    sizes = ", ".join(str(row[k]) for k in "HIEK")
    return f"{row['problem'].removesuffix('-zipf')} ({sizes}){skew}"


def number(value: float) -> str:
    """Three significant digits, e.g. 0.0312, 7.46, 1795; below a thousandth e.g. 1.6e-07."""
    if value == 0 or value != value:
        return "0" if value == 0 else "NaN"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 0
    while abs(value) * 10**digits < 99.95 and digits < 6:
        digits += 1
    return f"{value:.{digits}f}"


def ms(row: Row, quantity: str, factor: float = 1.0) -> str:
    """Median, with the 10th and 90th percentile in brackets; why there is none otherwise."""
    s = row.get(quantity)
    if s is None:
        return "failed" if f"{quantity}_error" in row else "-"
    median, p10, p90 = (number(s[k] * factor) for k in ("median_ms", "p10_ms", "p90_ms"))
    return f"{median} ({p10}-{p90})"


def figure(row: Row, quantity: str) -> str:
    """The quantity in three digits; "-" where the row has none."""
    return "-" if row.get(quantity) is None else number(row[quantity])


def percent(row: Row, quantity: str) -> str:
    """The quantity, a fraction, as a percentage; "-" where the row has none."""
    return "-" if row.get(quantity) is None else f"{row[quantity]:.1%}"


def label(name: str, result: Result) -> str:
    """An implementation as a table calls it, ours in bold."""
    if name != DENSE:
        return f"**{name}**" if name == "fastmoe" else name
    return "cuBLAS limit" if result["environment"]["cuda"] else "dense matmul limit"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; every line has as many cells as the header."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def status(row: Row) -> str | None:
    """Why an implementation has no figures, or None when it has."""
    if "not_available" in row:
        return f"not available: {row['not_available']}"
    if "wrong" in row:
        return "wrong, so not timed: " + "; ".join(row["wrong"])
    return f"failed: {row['error']}" if "error" in row else None


def key(row: Row) -> tuple[str, int]:
    """What rows that are compared with each other share: the problem and its tokens."""
    return row["problem"], row["T"]
