"""Gradient norm, clipping and optimizer groups for training loops over mixed meshes.

With tensor, expert and data parallelism a model's parameters are DTensors on several meshes (fsdp,
efsdp, tp, ep) beside plain tensors; torch's own helpers take one mesh at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.trainer_pt_utils import get_parameter_names

from ..kernel import get_kernel

# Parameters without weight decay, by name: those of transformers' Trainer (a test compares).
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter] | nn.Parameter,
    max_norm: float,
    error_if_nonfinite: bool = False,
) -> torch.Tensor:
    """Scales the gradients in place so that their common 2-norm is at most `max_norm`.

    What torch.nn.utils.clip_grad_norm_ does on one process, for any mix of plain tensors and
    DTensors. Every rank calls it with the same parameters in the same order; a parameter whose
    gradient is None on some ranks only is fine. max_norm=inf only measures.

    Returns the norm before clipping: fp32, shape (), the same on every rank, on the device; nothing
    waits for the device unless `error_if_nonfinite`. Plain tensors count as replicated, as DDP and
    TP leave them. Not for pipeline parallelism, whose ranks hold different parameters.

    Raises:
        ValueError: max_norm is negative or NaN.
        FloatingPointError: the norm is not finite, and `error_if_nonfinite`; nothing was scaled.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm={max_norm}: give 0 or more; inf only measures the norm")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    total = _total_norm(parameters)
    if error_if_nonfinite and not torch.isfinite(total).item():
        raise FloatingPointError(f"the gradients' norm is {total.item()}; nothing was clipped")
    if max_norm != math.inf:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        by_device = defaultdict(list)
        for gradient in (local(p.grad) for p in parameters if p.grad is not None):
            if gradient.numel():
                by_device[gradient.device].append(gradient)
        for device, gradients in by_device.items():
            get_kernel().scale_(gradients, factor.to(device))
    return total


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, **options
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Optimizer groups of the trainable parameters, none of which spans two meshes.

    torch's foreach and fused optimizers take no list that mixes meshes. Biases and norms get no
    weight decay, as in transformers' Trainer. `options`, such as lr=1e-5, go into every group.

    Raises:
        ValueError: weight_decay is negative, or the model has no trainable parameter.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay}: give 0 or more")
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(NO_DECAY)))
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups[mesh, weight_decay if name in decayed else 0.0].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return [
        {"params": parameters, "weight_decay": decay, **options}
        for (_, decay), parameters in groups.items()
    ]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory (call it under no_grad); else `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of the gradient, cut as its parameter is (call it under no_grad).

    Under tensor parallelism a gradient may be whole, or a sum to be made, where its parameter is
    sharded.
    """
    gradient = parameter.grad
    if isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def _total_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """2-norm over all gradients: one sum of squares per layout, summed over its sharded axes."""
    # (mesh, one placement per mesh axis, device) -> this rank's gradients
    layouts = defaultdict(list)
    for parameter in parameters:
        # By parameter, not by gradient: the collectives below must match on every rank.
        sharded = isinstance(parameter, DTensor)
        layout = (parameter.device_mesh, parameter.placements) if sharded else (None, ())
        gradients = layouts[*layout, local(parameter).device]
        if parameter.grad is not None:
            gradients.append(local_gradient(parameter))
    if not layouts:
        return torch.zeros(())
    totals = []
    for (mesh, placements, device), gradients in layouts.items():
        square = _square_sum(gradients, device)
        if mesh is not None:
            summed = [Replicate() if p.is_replicate() else Partial() for p in placements]
            square = DTensor.from_local(square, mesh, summed, run_check=False).full_tensor()
        totals.append(square)
    return torch.stack([total.to(totals[0].device) for total in totals]).sum().sqrt()


def _square_sum(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    gradients = [g for g in gradients if g.numel()]
    if not gradients:
        return torch.zeros((), device=device)
    return get_kernel().square_sum(gradients)
