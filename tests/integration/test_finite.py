"""What is not finite is found in the step in which it appears, and named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe_ep.training import FiniteCheck, FiniteCheckCallback
from tests import families


def small(dtype=torch.float32, device="cpu"):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 700)).to(device, dtype)
    model[1].bias = nn.Parameter(torch.zeros(700, device=device))  # a second dtype, if not fp32
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, FiniteCheck(model, optimizer, every=1)


def step(model, optimizer, check, spoil=lambda: None, spoil_after=lambda: None):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    spoil()
    check.gradients()
    for parameter in model.parameters():
        parameter.grad.nan_to_num_(0, 0, 0)
    optimizer.step()
    spoil_after()
    check.values()


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_names_what_is_not_finite(device, dtype, value):
    model, optimizer, check = small(dtype, device)
    step(model, optimizer, check)
    with pytest.raises(FloatingPointError, match="rank 0: step 2, gradient of 1.weight$"):
        step(model, optimizer, check, lambda: model[1].weight.grad[613, 4].fill_(value))

    model, optimizer, check = small(dtype, device)
    with pytest.raises(FloatingPointError, match="step 1, value of 0.bias$"):
        step(model, optimizer, check, spoil_after=lambda: model[0].bias.data[1].fill_(value))

    model, optimizer, check = small(dtype, device)

    def spoil_state():
        optimizer.state[model[1].bias]["exp_avg_sq"][7] = value

    with pytest.raises(FloatingPointError, match="step 1, exp_avg_sq of 1.bias$"):
        step(model, optimizer, check, spoil_after=spoil_state)


def test_the_first_in_time_and_then_in_the_model():
    model, optimizer, check = small(torch.bfloat16)
    check.every = 3
    step(model, optimizer, check)

    def spoil():
        model[1].weight.grad[0, 0] = math.nan
        model[1].bias.grad[0] = math.nan

    step(model, optimizer, check, spoil, spoil)
    with pytest.raises(FloatingPointError, match="step 2, gradient of 1.weight$"):
        step(model, optimizer, check, lambda: model[0].weight.grad[0, 0].fill_(math.nan))


def test_large_values_are_finite():
    model, _, check = small()
    model[0].weight.grad = torch.full_like(model[0].weight, 3e38)  # its square is not
    check.gradients()
    check.raise_if_found()


def test_refusals():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="every=0"):
        FiniteCheck(model, every=0)
    with pytest.raises(ValueError, match="every=0"):
        FiniteCheckCallback(every=0)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        FiniteCheck(model.requires_grad_(False))


class Spoil(TrainerCallback):
    """A NaN in the gradient of one parameter, in the third step's last micro-batch."""

    def __init__(self, name="model.layers.1.mlp.experts.down_proj", call=6):
        self.name, self.call, self.calls = name, call, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_parameter(self.name).register_hook(self.spoil)

    def spoil(self, gradient):
        self.calls += 1
        return gradient * math.nan if self.calls == self.call else gradient


def run(tmp_path, *callbacks, steps=5):
    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(3))
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=steps,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(
        families.tiny_model(families.family("qwen3_moe")),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=list(callbacks),
    ).train()


def test_trainer_names_the_gradient_that_clipping_would_hide(tmp_path):
    message = "step 3, gradient of model.layers.1.mlp.experts.down_proj$"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, Spoil(), FiniteCheckCallback(every=1))
    with pytest.raises(FloatingPointError, match=message):  # found later, named as it was
        run(tmp_path, Spoil(), FiniteCheckCallback(every=4))
    with pytest.raises(FloatingPointError, match=message):  # at the end of training at the latest
        run(tmp_path, Spoil(), FiniteCheckCallback(every=100))


def test_trainer_that_is_fine(tmp_path):
    run(tmp_path, FiniteCheckCallback(every=1), steps=3)
