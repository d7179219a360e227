"""Compares two runs that started from the same weights: the verdict, the table, the plot.
Losses and their differences are in nats per token."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .settings import EARLY, Settings
from .train import Run


@dataclass(frozen=True)
class Verdict:
    """How far the two loss curves are apart, as |difference| in nats per token."""

    first_step: float  # 4.8e-07
    first_steps: float  # largest in the first EARLY steps, 9.5e-07
    all_steps: float  # largest of all, 1.2e-03; nan if a loss is nan
    at_step: int  # where that is, counted from 1: 87
    problem: str | None  # None: float noise


def judge(settings: Settings, eager: Run, fast: Run) -> Verdict:
    """Holds the differences between two runs of equal length against `settings.bounds`."""
    apart = [math.inf if math.isnan(d) else d for d in differences(eager, fast)]
    largest = max(apart)
    at_step = apart.index(largest) + 1
    found = (apart[0], max(apart[:EARLY]), largest)
    bounds = settings.bounds
    problem = None
    for distance, bound, where in (
        (found[0], bounds.first_step, "at step 1"),
        (found[1], bounds.first_steps, f"within the first {EARLY} steps"),
        (found[2], bounds.all_steps, f"at step {at_step}"),
    ):
        if problem is None and distance > bound:
            problem = (
                f"the losses of {eager.implementation} and {fast.implementation} are "
                f"{distance:.1e} apart {where}, and rounding in {settings.dtype} explains no more "
                f"than {bound:.0e}"
            )
    return Verdict(*found, at_step, problem)


def differences(eager: Run, fast: Run) -> list[float]:
    """|difference| of the two losses at every step."""
    return [abs(a - b) for a, b in zip(eager.losses, fast.losses, strict=True)]


def step_seconds(run: Run) -> float:
    """Median time of a step, without the first tenth of the run (compilation, cold caches)."""
    return median(run.seconds[len(run.seconds) // 10 :])


def table(settings: Settings, eager: Run, fast: Run) -> str:
    """The two runs side by side, as text."""
    runs = (eager, fast)
    rows = [("", *(run.implementation for run in runs), "")]
    steps = len(eager.losses)
    for step in sorted({1, *(math.ceil(steps * part / 6) for part in range(1, 7))}):
        a, b = (run.losses[step - 1] for run in runs)
        rows.append((f"loss at step {step}", f"{a:.4f}", f"{b:.4f}", f"difference {b - a:+.1e}"))
    times = [step_seconds(run) for run in runs]
    speed = f"{times[0] / times[1]:.2f}x as fast"
    rows.append(("step time, median", *(f"{t * 1e3:.1f} ms" for t in times), speed))
    rows.append(("tokens/s", *(f"{settings.tokens_per_step / t:,.0f}" for t in times), ""))
    if eager.mfu and fast.mfu:
        rows.append(("MFU", *(f"{median(run.mfu):.1%}" for run in runs), "of the dense peak"))
    else:
        rows.append(("MFU", "-", "-", "this device's peak is not known"))
    if settings.device == "cuda":
        rows.append(("peak memory", *(f"{run.peak_memory / 2**30:.2f} GiB" for run in runs), ""))
    return "\n".join(f"{name:<20}{a:>12}{b:>12}   {note}".rstrip() for name, a, b, note in rows)


def plot(settings: Settings, eager: Run, fast: Run, device: str, path: Path) -> None:
    """Writes a PNG: the two loss curves, and below them how far they are apart."""
    from matplotlib.figure import Figure

    dark, light, red = "#0b4f6c", "#f2b134", "#c0392b"
    steps = range(1, len(eager.losses) + 1)
    figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
    losses, apart = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    for run, color, width in ((eager, light, 5), (fast, dark, 1.5)):
        label = f"{run.implementation}, {step_seconds(run) * 1e3:.0f} ms per step"
        losses.plot(steps, run.losses, label=label, color=color, linewidth=width)
    losses.set_ylabel("training loss (nats per token)")
    losses.legend(frameon=False)
    losses.set_title(
        f"Qwen3-MoE, {settings.experts} experts, top-{settings.top_k}, {settings.dtype}, {device}",
        fontsize=11,
    )

    bounds = settings.bounds
    floor = bounds.first_step / 100  # stands for losses that are equal to the last bit
    apart.semilogy(steps, [max(d, floor) for d in differences(eager, fast)], color=dark)
    split = min(EARLY, len(steps)) + 0.5
    for bound, left, right in (
        (bounds.first_steps, 0.5, split),
        (bounds.all_steps, split, len(steps) + 0.5),
    ):
        apart.plot([left, right], [bound, bound], color=red, linestyle="--", linewidth=1)
    apart.text(1, bounds.first_steps * 1.5, "bound", color=red, va="bottom")
    right_edge = ("axes fraction", "data")
    apart.annotate("equal", (1.01, floor), xycoords=right_edge, color="#777777", va="center")
    apart.set_ylim(floor / 2, bounds.all_steps * 5)
    apart.set_ylabel("|difference|\n(nats per token)")
    apart.set_xlabel("optimizer step")
    apart.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, apart):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
