"""AdamW and gradient clipping at the memory's bandwidth, one launch for all tensors of a dtype.

The weights of a Mixture-of-Experts model outnumber those it uses for a token ten to one, so these
passes over all of them take a sixth of a step, and torch's fused AdamW runs them at 60% of an
H200's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Trainer, TrainingArguments

from ..kernel import get_kernel
from .gradients import clip_grad_norm_, local

# What torch.optim.AdamW can be told to do and this AdamW cannot.
_OTHER = ("amsgrad", "maximize", "differentiable")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`: its formula (arXiv 1711.05101), arguments and state.

    Checkpoints of either load into the other. Parameters may be DTensors on any mix of meshes, as
    expert and data parallelism leave them. Each result is rounded once to its tensor's dtype, so
    bits differ from torch's in the last place.

    Example: ``Trainer(..., optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-5}))``, or `FastAdamWMixin`,
    which takes the arguments from TrainingArguments and clips at the same speed.

    Raises:
        ValueError: as torch's does, and where a state that is loaded has amsgrad, maximize or
            differentiable.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler unscales the gradients itself

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step over the parameters that have a gradient; what `closure` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, means, squares, steps = [], [], [], [], []
            self._init_group(group, params, grads, means, squares, [], steps)
            if params:
                tensors = ([local(t) for t in part] for part in (params, grads, means, squares))
                get_kernel().adamw_(
                    *tensors,
                    steps,
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; a state of an AdamW that is not fused gets its counts of steps moved."""
        groups = state_dict["param_groups"]
        if found := [name for name in _OTHER if any(group.get(name) for group in groups)]:
            raise ValueError(
                f"the state is of an AdamW with {', '.join(found)}, which hf_moe_ep's does not "
                "have; load it into torch.optim.AdamW"
            )
        alike = {"fused": True, "foreach": None, "capturable": False}
        super().load_state_dict(state_dict | {"param_groups": [group | alike for group in groups]})


class FastAdamWMixin:
    """Put it before Trainer, or a trainer of TRL, in the bases of your class.

    The optimizer is `AdamW` with the arguments that TrainingArguments give torch's, and gradients
    are clipped by `clip_grad_norm_`, whose norm is fp32 for bf16 gradients too.

    Raises:
        ValueError: `optim` is not adamw_torch_fused or adamw_torch, or DeepSpeed runs the steps.
    """

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model=None):
        check(args)
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return AdamW, {k: v for k, v in kwargs.items() if k != "fused"}

    def _clip_grad_norm(self, model):
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


def check(args: TrainingArguments) -> None:
    """ValueError where `AdamW` cannot stand in for the optimizer that the arguments ask for."""
    if args.optim not in ("adamw_torch_fused", "adamw_torch"):
        raise ValueError(
            f"fast_adamw is AdamW, but optim={str(args.optim.value)!r}; give "
            "optim='adamw_torch_fused', or leave fast_adamw out"
        )
    if args.deepspeed:
        raise ValueError("DeepSpeed brings its own optimizer; leave fast_adamw out")
