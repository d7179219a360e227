"""AdamW and gradient clipping at the memory's bandwidth, one launch for the tensors of a dtype.

The weights of a Mixture-of-Experts model outnumber those it uses for a token ten to one, so these
passes over all of them take a sixth of a step, and torch's run them at 62% (AdamW) and 19%
(clipping) of an H200's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from ..kernel import get_kernel
from .gradients import clip_grad_norm_, local, local_gradient

# What torch.optim.AdamW can be told to do and this AdamW cannot.
_OTHER = ("amsgrad", "maximize", "differentiable")
# How a group of torch's AdamW runs; this one runs in its own way.
_ALIKE = {"fused": True, "foreach": None, "capturable": False}


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`: its formula (arXiv 1711.05101), arguments and state.

    Checkpoints of either load into the other. Parameters may be DTensors on any mix of meshes, as
    expert and data parallelism leave them. Each result is rounded once to its tensor's dtype, so
    bits differ from torch's in the last place.

    Example: ``Trainer(..., optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-5}))``, or `FastAdamWMixin`,
    which takes the arguments from TrainingArguments and clips at the same speed.

    Raises:
        ValueError: as torch's does, and where a group, also of a state that is loaded, has amsgrad,
            maximize or differentiable.
        RuntimeError: a step inside of a CUDA graph's capture, which would freeze lr.
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

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; the group steps as the others do, whatever it says of fused and foreach."""
        _refuse_others([param_group])
        super().add_param_group(param_group | _ALIKE)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step over the parameters that have a gradient; what `closure` returns, if given."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "hf_moe_ep's AdamW does not capture into a CUDA graph; use "
                "torch.optim.AdamW(capturable=True)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, means, squares, steps = [], [], [], [], []
            self._init_group(group, params, grads, means, squares, [], steps)
            if params:
                get_kernel().adamw_(
                    [local(p) for p in params],
                    [local_gradient(p) for p in params],
                    [local(m) for m in means],
                    [local(v) for v in squares],
                    steps,
                    lr=float(group["lr"]),
                    betas=tuple(map(float, group["betas"])),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; a state of an AdamW that is not fused gets its counts of steps moved."""
        groups = state_dict["param_groups"]
        _refuse_others(groups)
        super().load_state_dict(state_dict | {"param_groups": [group | _ALIKE for group in groups]})


def _refuse_others(groups: list[dict]) -> None:
    if found := [name for name in _OTHER if any(group.get(name) for group in groups)]:
        raise ValueError(
            f"this is for an AdamW with {', '.join(found)}, which hf_moe_ep's does not have; use "
            "torch.optim.AdamW"
        )


class FastAdamWMixin:
    """Put it before Trainer, or a trainer of TRL, in the bases of your class.

    The optimizer is `AdamW` with the arguments that TrainingArguments give torch's, and gradients
    are clipped by `clip_grad_norm_`, whose norm is fp32 for bf16 gradients too.

    Raises:
        ValueError: `optim` is not adamw_torch_fused or adamw_torch, or DeepSpeed or FSDP1 runs the
            steps.
    """

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model=None):
        check(args)
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return AdamW, {k: v for k, v in kwargs.items() if k != "fused"}

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if sharded and not self.accelerator.is_fsdp2:
            raise ValueError(
                "fast_adamw does not know FSDP1's flat parameters; use FSDP2 (fsdp_version 2), or "
                "leave fast_adamw out"
            )

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
    if args.deepspeed_plugin is not None:
        raise ValueError("DeepSpeed brings its own optimizer; leave fast_adamw out")
