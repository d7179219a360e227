"""AdamW at the memory's bandwidth: torch's formula, state and arguments; in Trainer and sft."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from hf_moe_ep.cli import sft
from hf_moe_ep.training import AdamW, FastAdamWMixin
from tests import families

HOW = dict(lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)


def model_and_optimizers(ours=AdamW, **how):
    """A tiny model twice, with an optimizer each: ours and torch's."""
    model = families.tiny_model(families.family("qwen3_moe"))
    twin = copy.deepcopy(model)
    twins = torch.optim.AdamW(twin.parameters(), **HOW | how)
    return (model, ours(model.parameters(), **HOW)), (twin, twins)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    ids = torch.randint(3, 128, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_near(model, twin):
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


def test_steps_are_torchs():
    ours, theirs = model_and_optimizers(fused=True)
    for seed in range(3):
        step(*ours, seed)
        step(*theirs, seed)
    assert_near(ours[0], theirs[0])
    for got, want in zip(*(o.state.values() for _, o in (ours, theirs)), strict=True):
        assert got["step"] == want["step"] == 3
        torch.testing.assert_close(got["exp_avg_sq"], want["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("fused", [True, None])
def test_states_load_into_each_other(fused):
    ours, theirs = model_and_optimizers(fused=fused)
    step(*theirs, 0)
    ours[0].load_state_dict(theirs[0].state_dict())
    ours[1].load_state_dict(copy.deepcopy(theirs[1].state_dict()))
    assert all(s["step"].device == p.device for p, s in ours[1].state.items())
    for seed in (1, 2):
        step(*ours, seed)
        step(*theirs, seed)
    assert_near(ours[0], theirs[0])
    theirs[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))  # and back
    step(*ours, 3)
    step(*theirs, 3)
    assert_near(ours[0], theirs[0])


def test_a_closure_is_called_with_gradients_on():
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 8
    torch.testing.assert_close(weight.detach(), torch.full((8,), 0.9))
    assert AdamW([torch.nn.Parameter(torch.ones(2))]).step() is None  # no gradient


def test_a_state_of_another_formula_is_refused():
    ours, theirs = model_and_optimizers(amsgrad=True)
    step(*theirs, 0)
    with pytest.raises(ValueError, match="for an AdamW with amsgrad"):
        ours[1].load_state_dict(copy.deepcopy(theirs[1].state_dict()))


def test_groups_of_another_formula_are_refused_and_others_run_alike():
    weight = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="for an AdamW with maximize"):
        AdamW([{"params": [weight], "maximize": True}])
    optimizer = AdamW([{"params": [weight], "fused": False, "foreach": True}], lr=0.1)
    weight.grad = torch.ones(8)
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] and weight.max() < 1


def test_betas_may_change_from_step_to_step():
    ours, theirs = model_and_optimizers(fused=True)
    for seed, beta1 in enumerate((0.95, 0.85, 0.0)):
        for _, optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["betas"] = (beta1, 0.99)
        step(*ours, seed)
        step(*theirs, seed)
    assert_near(ours[0], theirs[0])


def test_fsdp1_is_refused():
    class Sharded:
        def create_accelerator_and_postprocess(self):
            self.accelerator = SimpleNamespace(
                distributed_type=DistributedType.FSDP, is_fsdp2=self.is_fsdp2
            )

    class Fast(FastAdamWMixin, Sharded):
        is_fsdp2 = True

    Fast().create_accelerator_and_postprocess()
    Fast.is_fsdp2 = False
    with pytest.raises(ValueError, match="FSDP1's flat parameters; use FSDP2"):
        Fast().create_accelerator_and_postprocess()


class FastTrainer(FastAdamWMixin, Trainer):
    pass


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_a_trainer_with_it_trains_as_without(tmp_path, max_grad_norm):
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 128, (8, 8))]
    first = families.tiny_model(families.family("qwen3_moe"))
    logs, models = [], []
    for cls in (FastTrainer, Trainer):
        args = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            weight_decay=0.1, max_grad_norm=max_grad_norm, logging_steps=1, use_cpu=True,
            report_to=[], save_strategy="no",
        )  # fmt: skip
        models.append(copy.deepcopy(first))
        trainer = cls(models[-1], args, train_dataset=rows)
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, AdamW) == (cls is FastTrainer)
        assert len(trainer.optimizer.param_groups) == 2  # with and without weight decay
        logs.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and min(logs[0]) > 0.05
    assert_near(*models)


@pytest.mark.parametrize("flags", [["--optim", "sgd"], ["--optim", "adafactor"]])
def test_sft_refuses_another_optimizer(flags):
    with pytest.raises(ValueError, match=f"fast_adamw is AdamW, but optim='{flags[1]}'"):
        sft.prepare(["--model_name_or_path", "x", "--dataset_name", "y", "--use_cpu", "true",
                     "--fast_adamw", "true", *flags])  # fmt: skip
