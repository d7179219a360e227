"""What the kernel tests share: devices and dtypes, a run with all gradients, the error bound."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmoe
from benchmarks.problems import Inputs, Problem
from fastmoe.device import INTERPRETING

# The interpreter is for CPU tensors: its small tiles, in fp32.
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if DEVICE == "cuda" else [torch.float32]


FEW = 64  # numbers whose error's norm is luck


class Recorder(TorchDispatchMode):
    """Names of the fastmoe ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "moe" in func.namespace:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def gate_of(p: Problem) -> fastmoe.Gate:
    return fastmoe.Gate(**p.gate_options)


def run(function, p: Problem, inputs: Inputs, dtype: torch.dtype | None = None, **options):
    """The output and every gradient by name, in `dtype` or the inputs' own."""
    leaves = {
        k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.leaves().items()
    }
    out = function(
        leaves["x"], inputs.top_k_index, leaves["top_k_weights"], leaves["up"], leaves["down"],
        up_bias=leaves.get("up_bias"), down_bias=leaves.get("down_bias"),
        is_transposed=p.transposed, **{"gate": gate_of(p)} | options,
    )  # fmt: skip
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad.to(out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||, or ||value|| where the truth is zero; NaN stays NaN."""
    scale = truth.norm()
    return float((value.double() - truth).norm() / (scale if scale > 0 else 1.0))


def assert_as_good_as_torch(got, p: Problem, inputs: Inputs, **options) -> None:
    """Every result of `got` is about as far from fp64 as plain PyTorch in the same dtype.

    That is at most twice as far, plus rounding. A routing weight's gradient is one dot product:
    where its terms cancel, it is their rounding that counts, and where they do to less than half,
    of fewer than `FEW` numbers, four times as much: neither side's error tells the other's.
    """
    dtype = inputs.x.dtype
    truth = run(fastmoe.reference_experts, p, inputs, torch.float64, **options)
    torch_in_dtype = run(fastmoe.reference_experts, p, inputs, **options)
    eps = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    for name, value in got.items():
        assert value.dtype == dtype, name
        rounding = eps
        if name == "top_k_weights" and (numbers := int(truth[name].count_nonzero())):
            cancels = _terms_of_dots(p, inputs, **options) / float(truth[name].norm())
            rounding *= max(1.0, cancels) * (4 if numbers < FEW and cancels > 2 else 1)
        ours, bound = error(value, truth[name]), 2 * error(torch_in_dtype[name], truth[name])
        assert ours <= bound + rounding, (
            f"{p.name} {name}: error {ours:.3g} above {bound:.3g} + {rounding:.3g}"
        )


def _terms_of_dots(p: Problem, inputs: Inputs, **options) -> float:
    """The Euclidean norm of all terms grad * y, whose sums are the routing weights' gradients."""
    names = ("x", "up", "down", "up_bias", "down_bias", "grad")
    x, up, down, up_bias, down_bias, grad = (
        None if (t := getattr(inputs, n)) is None else t.double() for n in names
    )
    slots = inputs.top_k_index.reshape(-1, 1)
    y = fastmoe.reference_experts(
        x.repeat_interleave(p.K, 0), slots, torch.ones_like(slots, dtype=x.dtype), up, down,
        up_bias=up_bias, down_bias=down_bias, is_transposed=p.transposed,
        **{"gate": gate_of(p)} | options,
    )  # fmt: skip
    return float((y * grad.repeat_interleave(p.K, 0)).norm())
