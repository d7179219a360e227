"""Gradient accumulation without another gradient: expert weights with a `main_grad` buffer.

Autograd makes the gradient of every expert weight (E, ., .) anew in each micro-batch and adds it to
`.grad` in another pass. fastmoe adds it in the epilogue of its GEMM where the weight has a
`main_grad`; here that buffer is `.grad`, so that nothing else has to know.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..experts import NAMES
from .flops import is_experts


def accumulate_in_place(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
) -> list[nn.Parameter]:
    """Lets the gradients of the expert weights be added where they accumulate. Call it once.

    Every trainable expert weight gets a buffer, its `main_grad` and its `.grad` in one, that lives
    as long as the weight. Clipping, optimizers and zero_grad, to None or to zeros, are used as
    before; hooks on these weights' gradients are not called.

    Args:
        model: its experts are "fastmoe" or "fastmoe_lean", whole on every process, before DDP wraps
            it; what reduces `.grad` (DDP, with no_sync or without) finds there what it always does.
        optimizer: needed with another `dtype` than the weights': its step then gets the gradients
            rounded to the weights' dtype, all at once.
        dtype: of the buffers, that of the weights by default. torch.float32 under 16-bit weights
            keeps the small gradients of many micro-batches, at twice the buffers' memory, on one
            process only.

    Returns:
        The weights.

    Raises:
        ValueError: no trainable expert weights, experts of another implementation, weights that are
            sharded (FSDP, expert parallelism) or not plain parameters, a dtype without an
            optimizer, on several processes or on a torch before 2.10.
    """
    modules = [m for m in model.modules() if is_experts(m)]
    weights = [w for m in modules for w in _weights(m)]
    _require(modules, weights, optimizer, dtype)
    for w in weights:
        w.main_grad = torch.zeros_like(w, dtype=dtype, memory_format=torch.contiguous_format)
    others = [w for w in weights if w.main_grad.dtype != w.dtype]
    for w in others:
        w.grad_dtype = w.main_grad.dtype
    if others:
        optimizer.register_step_pre_hook(lambda *_: _round(others))
        optimizer.register_step_post_hook(lambda *_: _restore(others))
    for module in modules:
        module.register_forward_hook(_attach_in_backward)
    return weights


class AccumulateInPlaceCallback(TrainerCallback):
    """`accumulate_in_place` for Trainer and TRL, as one of their `callbacks=`.

    By name, in the weights' dtype: `report_to=["accumulate_in_place"]`.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.deepspeed:
            raise ValueError(
                "accumulate_in_place: DeepSpeed keeps gradients of its own; leave it out"
            )
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks
        accumulate_in_place(model, optimizer, self.dtype)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The trainable stacks of an experts module."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    return [w for w in (up, module.down_proj) if w.requires_grad]


def _require(modules, weights, optimizer, dtype) -> None:
    if not weights:
        raise ValueError("the model has no trainable expert weights to accumulate gradients of")
    for module in modules:
        name = module.config._experts_implementation
        if name not in NAMES:
            raise ValueError(
                f"experts_implementation={name!r} adds no gradient to main_grad; use one of "
                f"{', '.join(NAMES)}"
            )
    if any(isinstance(w, DTensor) for w in weights):
        raise ValueError(
            "gradients accumulate in place where expert weights are whole: FSDP and expert "
            "parallelism divide them and take the gradients that autograd gives; leave "
            "accumulate_in_place out, or train without both"
        )
    if any(not isinstance(w, nn.Parameter) or w.dim() != 3 for w in weights) or not all(
        w.is_contiguous() for w in weights
    ):
        raise ValueError("expert weights must be contiguous stacks of matrices, plain parameters")
    wanted = {dtype or w.dtype for w in weights} - {w.dtype for w in weights}
    if wanted - {torch.float32}:
        raise ValueError(f"dtype={dtype}: give None for the weights' own, or torch.float32")
    if wanted and optimizer is None:
        raise ValueError(f"dtype={dtype} differs from the weights': pass the optimizer too")
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if wanted and several:
        raise ValueError(f"dtype={dtype} on several processes: they reduce in the weights' dtype")
    if wanted and not hasattr(torch.Tensor, "grad_dtype"):
        raise ValueError(f"dtype={dtype} needs torch 2.10, which lets .grad have another dtype")


def _attach_in_backward(module: nn.Module, args, output: torch.Tensor) -> None:
    """Forward hook: right before the module's backward, `.grad` is the buffer, zeroed if None.

    Not earlier, because zero_grad may come between forward and backward.
    """
    if output.requires_grad and not torch.compiler.is_compiling():
        weights = _weights(module)
        output.register_hook(lambda _: _attach(weights))


def _attach(weights: list[nn.Parameter]) -> None:
    for w in weights:
        if w.grad is w.main_grad:
            continue
        if w.grad is None:
            w.main_grad.zero_()
        else:
            w.main_grad.copy_(w.grad)
        w.grad = w.main_grad


def _round(weights: list[nn.Parameter]) -> None:
    """Before an optimizer's step: gradients in the weights' dtype instead of the buffers."""
    for w in weights:
        grad, w.grad = w.grad, None
        w.grad_dtype = w.dtype
        w.grad = None if grad is None else grad.to(w.dtype)


def _restore(weights: list[nn.Parameter]) -> None:
    for w in weights:
        stepped, w.grad = w.grad is not None, None
        w.grad_dtype = w.main_grad.dtype
        w.grad = w.main_grad if stepped else None
