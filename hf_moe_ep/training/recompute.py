"""Gradient checkpointing that keeps the chosen experts, in Trainer and TRL."""

from __future__ import annotations

import os

from transformers import TrainerCallback, TrainingArguments

from ..expert_parallel import keep_routing


class KeepRoutingCallback(TrainerCallback):
    """Where `activation_checkpointing` is on, the recompute takes the experts that the forward
    chose (`hf_moe_ep.expert_parallel.keep_routing`); does nothing where it is off.

    `Trainer(..., callbacks=[KeepRoutingCallback()])`, or "keep_routing" in `report_to`: a
    `context_fn` in `activation_checkpointing_kwargs` could not be written into YAML, nor saved
    with the arguments.

    Raises ValueError, when training begins, where layers are compiled or where
    `activation_checkpointing_kwargs` have a `context_fn`, TRL's `selective`, which has one of its
    own, or `use_reentrant`, which knows none.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not args.activation_checkpointing:
            return
        options = dict(args.activation_checkpointing_kwargs or {})
        every_n_layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        if not can_keep_routing(args):
            raise ValueError(
                f"activation_checkpointing_kwargs={options}, torch_compile={args.torch_compile} "
                "and keep_routing, which needs use_reentrant=False, the context_fn and layers that "
                "are not compiled: change them, or drop keep_routing"
            )
        options |= {"use_reentrant": False, "context_fn": keep_routing}
        model.activation_checkpointing_enable(
            options, every_n_layers=every_n_layers, offload=offload
        )


def can_keep_routing(args: TrainingArguments) -> bool:
    """Whether layers are not compiled, and nothing else has a say in the recompute."""
    others = ("use_reentrant", "context_fn", "selective")
    options = args.activation_checkpointing_kwargs or {}
    launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    return not (args.torch_compile or launched or any(options.get(name) for name in others))
