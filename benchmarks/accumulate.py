"""What the two ways to save memory cost: experts that keep their input alone (`fastmoe_lean`), and
gradients of micro-batches that are added where they accumulate (`main_grad`).

T, H, I, E, K as in problems.py; all micro-batches have T tokens, and the same weights.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from . import gate, layer, peers
from .gate import Forward
from .layer import Row, Settings, new_row
from .problems import Inputs, Problem, make_inputs
from .timing import MIB, interleave

MICRO_BATCHES = 8
WEIGHTS = ("up", "down")
# Way -> dtype of the buffers: None has none, "weights" that of the weights.
WAYS = {
    "no accumulation": None,
    "autograd": None,
    "main_grad": "weights",
    "main_grad, fp32": torch.float32,
}


def measure(problem: Problem, settings: Settings) -> list[Row]:
    """Rows as in the training benchmark for both kinds of experts, then one for each way to
    accumulate, with the time of all micro-batches, the peak memory over their start (weights and
    inputs exist then) and the error of the sum.
    """
    both = replace(settings, implementations=(peers.OURS, peers.LEAN))
    rows = layer.train(problem, both)
    _compare_bits(rows, problem, settings)
    forward = peers.IMPLEMENTATIONS[peers.OURS](problem)
    batches = _batches(problem, settings)
    ways = {way: _Way(way, forward, batches) for way in WAYS}
    checked = {way: new_row(problem, peers.OURS) | {"way": way} for way in WAYS}
    _check(ways, checked, batches)
    for way, row in checked.items():
        row["peak_mib"] = _peak_mib(ways[way], settings.device)
    calls = {w: way for w, way in ways.items() if "wrong" not in checked[w]}
    for way in calls.values():
        way.allocate()
    for way, spread in interleave(calls, settings.device, settings.seconds).items():
        checked[way]["micro_batches"] = asdict(spread)
    return rows + list(checked.values())


class _Way:
    """Calling it runs all micro-batches from gradients of None or zero, as after an optimizer's
    step."""

    def __init__(self, way: str, forward: Forward, batches: list[Inputs]):
        self.way, self.forward, self.batches = way, forward, batches
        self.weights = [getattr(batches[0], n).requires_grad_() for n in WEIGHTS]
        self.buffers: list[torch.Tensor] = []

    def allocate(self) -> None:
        dtype = WAYS[self.way]
        if dtype is not None and not self.buffers:
            same = None if dtype == "weights" else dtype
            self.buffers = [torch.zeros_like(w, dtype=same) for w in self.weights]

    def release(self) -> None:
        self.buffers = []

    def __call__(self) -> list[torch.Tensor]:
        """The accumulated gradients; the weights are left without."""
        for w, buffer in zip(self.weights, self.buffers, strict=bool(self.buffers)):
            w.main_grad = buffer.zero_()
        try:
            for batch in self.batches:
                if self.way == "no accumulation":
                    self._drop()
                self.forward(batch).backward(batch.grad)
                batch.x.grad = batch.top_k_weights.grad = None
            return self.buffers or [w.grad for w in self.weights]
        finally:
            self._drop()
            for w in self.weights:
                if hasattr(w, "main_grad"):
                    del w.main_grad

    def _drop(self) -> None:
        for w in self.weights:
            w.grad = None


def _batches(problem: Problem, settings: Settings) -> list[Inputs]:
    made = make_inputs(problem, settings.dtype, str(settings.device))
    batches = []
    for seed in range(MICRO_BATCHES):
        other = make_inputs(problem, settings.dtype, str(settings.device), seed)
        batches.append(replace(other, up=made.up, down=made.down))
        for leaf in (other.x, other.top_k_weights):
            leaf.requires_grad_()
    return batches


def _compare_bits(rows: list[Row], problem: Problem, settings: Settings) -> None:
    """Whether both kinds of experts give the same bits, into the lean one's row."""
    inputs = make_inputs(problem, settings.dtype, str(settings.device))
    want, got = (
        gate.run(peers.IMPLEMENTATIONS[n](problem), inputs) for n in (peers.OURS, peers.LEAN)
    )
    different = [name for name in want if not torch.equal(got[name], want[name])]
    row = next(r for r in rows if r["implementation"] == peers.LEAN)
    row["same_bits"] = not different
    if different:
        row["wrong"] = [f"{name}: other bits than {peers.OURS}'s" for name in different]


def _check(ways: dict[str, _Way], rows: dict[str, Row], batches: list[Inputs]) -> None:
    """The relative error of every way's sum against the wide reference's; ours may not be above
    autograd's by more than a tenth.
    """
    truth: dict[str, torch.Tensor] = {}
    for batch in batches:
        found = gate.reference(batch)
        for name in WEIGHTS:
            truth[name] = truth[name].add_(found[name]) if name in truth else found[name]
        del found
    for name, way in ways.items():
        if name == "no accumulation":
            continue
        way.allocate()
        sums = dict(zip(WEIGHTS, way(), strict=True))
        way.release()
        rows[name]["sum_errors"] = {n: e.norm for n, e in gate.errors(sums, truth).items()}
    bound = rows["autograd"]["sum_errors"]
    eps = torch.finfo(batches[0].x.dtype).eps / 64
    for row in rows.values():
        worse = [
            f"{n}: error {e:.3g} of the sum, autograd's is {bound[n]:.3g}"
            for n, e in row.get("sum_errors", {}).items()
            if not e <= 1.1 * bound[n] + eps  # NaN fails too
        ]
        if worse:
            row["wrong"] = worse


def _peak_mib(way: _Way, device: torch.device) -> float | None:
    """The most memory during the micro-batches over their start, the buffers included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way.allocate()
    way()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    way.release()
    return peak / MIB
