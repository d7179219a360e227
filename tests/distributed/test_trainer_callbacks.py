"""Router loss, token counts and the finite check in Trainer over two ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_moe_ep.training import (
    FiniteCheckCallback,
    GlobalRouterLossCallback,
    RouterLossCallback,
    TokenCountCallback,
)
from tests.distributed.ranks import run_ranks
from tests.integration.test_losses import (
    SEQUENCES,
    dataset,
    expected_gradients,
    router_model,
    wrong,
)

WORLD = 2


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trainer(folder, batch_size, accumulation, callbacks, **options):
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation="eager",
        distributed_config=DistributedConfig(fsdp_size=WORLD, ep_size=WORLD),
    )
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **dict(max_steps=1, max_grad_norm=0.0) | options,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        include_num_input_tokens_seen="all",
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=dataset(), callbacks=callbacks)


def trained(*args):
    """What one SGD step at learning rate 1 subtracts, and the tokens that the Trainer counts."""
    run = trainer(*args)
    before = {n: whole(p) for n, p in run.model.named_parameters()}
    run.train()
    step = {n: before[n] - whole(p) for n, p in run.model.named_parameters()}
    return step, run.state.num_input_tokens_seen


def check(folder):
    expected = torch.load(folder / "expected.pt")
    # 8 sequences of 12 tokens: 2 ranks x 2 micro-batches of 2
    got, tokens = trained(folder, 2, 2, [RouterLossCallback(), TokenCountCallback()])
    assert not (bad := wrong(got, expected["of four"])), bad
    assert tokens == SEQUENCES * 12
    got, _ = trained(folder, 4, 1, [GlobalRouterLossCallback()])
    assert not (bad := wrong(got, expected["of all"])), bad
    got, _ = trained(folder, 2, 2, [])
    assert wrong(got, expected["of four"], bound=0.1), "the Trainer does not need the callback"
    check_finite(folder)


def check_finite(folder):
    """A NaN in one row of a router's gradient lands in the part of rank 0; clipping spreads it."""
    callbacks = [Spoil(), FiniteCheckCallback(every=2)]
    run = trainer(folder, 2, 1, callbacks, max_steps=4, max_grad_norm=1.0)
    with pytest.raises(FloatingPointError) as error:
        run.train()
    assert str(error.value).endswith(
        "rank 0: step 2, gradient of model.layers.1.mlp.gate.weight; "
        "rank 1: step 2, value of model.embed_tokens.weight"
    )


class Spoil(TrainerCallback):
    """In the second step, on the second rank alone."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = state
        gate = model.get_submodule("model.layers.1.mlp.gate")
        gate.register_forward_hook(self.hook_weight)  # in a forward FSDP2 has gathered it

    def hook_weight(self, gate, args, output):
        if self.steps.global_step == 1 and dist.get_rank() == 1:
            gate.weight.register_hook(self.spoil)

    def spoil(self, gradient):
        gradient = gradient.clone()
        gradient[1] = math.nan
        return gradient


def test_two_ranks(tmp_path):
    router_model().save_pretrained(tmp_path)
    expected = {"of four": expected_gradients(4), "of all": expected_gradients(1)}
    torch.save(expected, tmp_path / "expected.pt")
    run_ranks(WORLD, check, tmp_path)
