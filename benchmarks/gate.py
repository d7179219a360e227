"""The gate that every implementation passes before it is timed: its forward and its gradients
against a wide reference.

Our error may be at most twice that of transformers' grouped_mm in the same dtype, plus a small eps;
a peer's may be anything that its dtype's rounding explains. Nothing may be NaN although all memory
that is allocated meanwhile starts as NaN. T, H, I, E, K as in problems.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from .problems import GPT_OSS_ALPHA, Inputs, Problem

Forward = Callable[[Inputs], torch.Tensor]
OUTPUT = "output"


@dataclass(frozen=True)
class Error:
    """How far a tensor is from the reference's, relative to the reference's size."""

    norm: float  # ||got - want|| / ||want||, Frobenius: sees a small error everywhere. 0.004
    worst: float  # the same of the worst row, over the rms norm of a row: sees one wrong row. 0.006


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the reference: fp64 for fp32, fp32 for 16-bit types (exact products, and fast at
    real sizes).
    """
    return torch.float32 if dtype.itemsize == 2 else torch.float64


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New uninitialised tensors hold NaN (integers: their maximum), so a value that was never
    written shows itself.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # Only the filling is wanted here, not the order of anybody's sums.
            warnings.filterwarnings("ignore", message=".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        torch.utils.deterministic.fill_uninitialized_memory = fill_before


def reference(
    inputs: Inputs, gradients: bool = True, problem: Problem | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients of the experts by plain PyTorch, in a wide dtype, one expert at a time.

    They are SwiGLU experts with the gate half first, or those of a problem `of_gpt_oss`. Only one
    expert's activations exist at once, so a real size fits. Keys: "output", and the names of
    `inputs.leaves()` for the gradients of <output, inputs.grad>.
    """
    dtype = wide(inputs.x.dtype)
    results = {OUTPUT: torch.zeros_like(inputs.x, dtype=dtype)}
    if gradients:
        results |= {n: torch.zeros_like(t, dtype=dtype) for n, t in inputs.leaves().items()}
    for e in range(inputs.up.shape[0]):
        tokens, slots = torch.where(inputs.top_k_index == e)
        parts = {n: t[e] for n, t in inputs.leaves().items() if n not in ("x", "top_k_weights")}
        parts |= {"x": inputs.x[tokens], "top_k_weights": inputs.top_k_weights[tokens, slots]}
        parts = {n: t.detach().to(dtype).requires_grad_(gradients) for n, t in parts.items()}
        y = _expert(parts, problem) * parts["top_k_weights"][:, None]  # (rows of e, H)
        results[OUTPUT].index_add_(0, tokens, y.detach())
        if gradients:
            found = torch.autograd.grad(y, list(parts.values()), inputs.grad[tokens].to(dtype))
            of = dict(zip(parts, found, strict=True))
            results["x"].index_add_(0, tokens, of.pop("x"))
            results["top_k_weights"][tokens, slots] = of.pop("top_k_weights")
            for name, value in of.items():
                results[name][e] = value
    return results


def _expert(parts: dict[str, torch.Tensor], problem: Problem | None) -> torch.Tensor:
    """One expert's rows (n, H) before the routing weights."""
    if problem is None or problem.plain:
        gate_half, up_half = (parts["x"] @ parts["up"].T).chunk(2, -1)  # (n, I) each
        return (silu(gate_half) * up_half) @ parts["down"].T
    if not problem.of_gpt_oss:
        raise ValueError(f"no reference for {problem.name!r}")
    h = parts["x"] @ parts["up"] + parts["up_bias"]
    gate, up = h[:, ::2].clamp(max=problem.limit), h[:, 1::2].clamp(-problem.limit, problem.limit)
    a = (up + 1) * gate * torch.sigmoid(GPT_OSS_ALPHA * gate)
    return a @ parts["down"] + parts["down_bias"]


def run(forward: Forward, inputs: Inputs, gradients: bool = True) -> dict[str, torch.Tensor]:
    """What `forward` gives for the output and every gradient, in poisoned memory; keys as in
    `reference`.
    """
    leaves = inputs.leaves()
    for leaf in leaves.values():
        leaf.requires_grad_(gradients)
    with poisoned_memory():
        if not gradients:
            with torch.no_grad():
                return {OUTPUT: forward(inputs)}
        y = forward(inputs)
        grads = torch.autograd.grad(y, list(leaves.values()), inputs.grad)
    return {OUTPUT: y.detach()} | dict(zip(leaves, grads, strict=True))


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, Error]:
    """The error of each tensor; NaN where `got` has one."""
    found = {}
    for name, w in want.items():
        difference = torch.linalg.vector_norm(got[name].to(w.dtype) - w, dim=-1)  # per row
        size = torch.linalg.vector_norm(w).clamp_min(torch.finfo(w.dtype).tiny)
        rms_row = size / difference.numel() ** 0.5
        norm = torch.linalg.vector_norm(difference) / size
        found[name] = Error(norm.item(), (difference.max() / rms_row).item())
    return found


def objections(mine: dict[str, Error], baseline: dict[str, Error], dtype: torch.dtype) -> list[str]:
    """Why our implementation fails the gate, one line per reason; empty when it passes.

    Twice the baseline's error overall. The worst row is an extreme value, for which right
    implementations differ up to 3.1-fold (60 seeds at 24 to 40 tokens, three dtypes, CPU): four
    times the baseline's, while a row that is wrong altogether is near 1.
    """
    eps = torch.finfo(dtype).eps / 4
    lines = []
    for name, error in mine.items():
        for measure, factor in (("norm", 2), ("worst", 4)):
            value = getattr(error, measure)
            bound = factor * getattr(baseline[name], measure) + eps
            if not value < bound:  # NaN fails too
                lines.append(f"{name}: {measure} error {value:.3g}, not below {bound:.3g}")
    return lines


def gross_objections(found: dict[str, Error], dtype: torch.dtype) -> list[str]:
    """Why a peer's results are wrong: an error far above what the dtype's rounding explains.

    Less strict than for ours, because a peer may round more often than grouped_mm does: how much is
    in the result.
    """
    bound = max(8 * torch.finfo(dtype).eps, 1e-5)  # bf16: 0.06, where 0.003 to 0.014 is seen
    return [
        f"{name}: norm error {error.norm:.3g}, not below {bound:.3g}"
        for name, error in found.items()
        if not error.norm < bound
    ]
