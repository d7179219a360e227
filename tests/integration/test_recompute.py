"""Trainer with activation checkpointing: which experts the recompute takes."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_moe_ep.training import KeepRoutingCallback, callbacks
from hf_moe_ep.training.recompute import can_keep_routing
from tests import families


def train(folder, calls, *trainer_callbacks, **options):
    """One step; `calls` gets the ids of the first layer's experts. Every second call of its router,
    the recompute, is spoilt.
    """
    torch.manual_seed(0)
    model = families.tiny_model(families.family("qwen3_moe"))
    model.set_experts_implementation("fastmoe")  # eager's shapes tell, and torch raises
    block = model.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda module, args: calls.append(args[1].clone()))
    block.gate.register_forward_pre_hook(lambda m, args: (-args[0],) if len(calls) % 2 else None)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        max_steps=1,
        activation_checkpointing=True,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=torch.cuda.device_count() != 1,  # several would train side by side
        **{"report_to": []} | options,
    )
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows, callbacks=list(trainer_callbacks)).train()


def test_the_recompute_takes_the_experts_of_the_forward(tmp_path):
    kept, chosen_anew, by_name = [], [], []
    train(tmp_path, kept, KeepRoutingCallback())
    train(tmp_path, chosen_anew)
    callbacks.register()
    train(tmp_path, by_name, report_to=["keep_routing"])
    for forward, recompute in (kept, by_name):
        assert torch.equal(forward, recompute)
    forward, recompute = chosen_anew
    assert torch.equal(forward, kept[0]) and not torch.equal(forward, recompute)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"context_fn": print}])
def test_other_checkpointing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match="drop keep_routing"):
        train(tmp_path, [], KeepRoutingCallback(), activation_checkpointing_kwargs=options)


def test_compiled_layers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="torch_compile=True and keep_routing"):
        train(tmp_path, [], KeepRoutingCallback(), torch_compile=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    assert not can_keep_routing(arguments)
