"""Router loss and token counts in Trainer; the loss against a forward of the model itself."""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_moe_ep import DistributedConfig
from hf_moe_ep.training import (
    FiniteCheckCallback,
    GlobalRouterLossCallback,
    RouterLossCallback,
    TokenCountCallback,
    batch_replicas,
    register,
)
from hf_moe_ep.training.losses import balance, router_loss_coefficient, routing_sums
from tests import families

COEFFICIENT = 5.0  # large, so that a wrong weight cannot hide behind the cross-entropy
SEQUENCES = 8


def has_router_loss(family):
    """deepseek_v4 has, but not the tiny model: both of its layers route by a table."""
    if family.name == "deepseek_v4" or "CausalLM" not in families.model_class(family).__name__:
        return False
    return hasattr(importlib.import_module(family.module), "load_balancing_loss_func")


FAMILIES = [f for f in families.tested() if has_router_loss(f)]


def router_model(family=None):
    model = families.tiny_model(family or families.family("qwen3_moe"))
    model.config.get_text_config().output_router_logits = True
    model.config.get_text_config().router_aux_loss_coef = COEFFICIENT
    model.router_aux_loss_coef = COEFFICIENT
    return model.train()


def dataset():
    ids = torch.randint(3, 128, (SEQUENCES, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row, "attention_mask": row.new_ones(12)} for row in ids]


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def expected_gradients(micro_batches, one_router_loss=False):
    """Of cross-entropy + COEFFICIENT * router loss, the latter averaged over `micro_batches` parts.

    one_router_loss: the router loss of all sequences together instead.
    """
    model = router_model()
    rows = dataset()
    size = len(rows) // micro_batches
    for at in range(0, len(rows), size):
        output = model(**stacked(rows[at : at + size]), use_cache=False)
        loss = output.loss - (COEFFICIENT * output.aux_loss if one_router_loss else 0.0)
        (loss / micro_batches).backward()
    if one_router_loss:
        (COEFFICIENT * model(**stacked(rows), use_cache=False).aux_loss).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def trained_gradients(tmp_path, micro_batches, callbacks=(), trainer_class=Trainer, **options):
    """What one SGD step at learning rate 1 subtracts from the parameters."""
    model = router_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=SEQUENCES // micro_batches,
        gradient_accumulation_steps=micro_batches,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = trainer_class(model, arguments, train_dataset=dataset(), callbacks=list(callbacks))
    trainer.train()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def wrong(actual, expected, bound=2e-5):
    largest = max(g.abs().max() for g in expected.values())
    errors = {n: ((actual[n] - g).abs().max() / largest).item() for n, g in expected.items()}
    return {n: e for n, e in errors.items() if not e < bound}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_router_loss_is_the_models_own(family):
    model = router_model(family).eval()
    inputs = families.tiny_inputs(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -5:] = 0
    labels = inputs["input_ids"]
    output = model(**inputs, attention_mask=mask, labels=labels, output_router_logits=True)
    model.config.get_text_config().output_router_logits = False
    without = model(**inputs, attention_mask=mask, labels=labels, output_router_logits=False).loss
    added = router_loss_coefficient(model) * output.aux_loss
    assert torch.allclose(output.loss, without + added, rtol=1e-5)
    top_k = model.config.get_text_config().num_experts_per_tok
    counts, probabilities, tokens = routing_sums(output.router_logits, top_k, mask)
    assert torch.allclose(balance(counts / tokens, probabilities / tokens), output.aux_loss)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_weight_does_not_depend_on_accumulation(tmp_path, micro_batches):
    expected = expected_gradients(micro_batches)
    assert not wrong(trained_gradients(tmp_path, micro_batches, [RouterLossCallback()]), expected)


def test_trainer_alone_is_wrong(tmp_path):
    assert wrong(trained_gradients(tmp_path, 2), expected_gradients(2), bound=0.1)


def test_global_router_loss(tmp_path):
    expected = expected_gradients(1)
    assert not wrong(trained_gradients(tmp_path, 1, [GlobalRouterLossCallback()]), expected)


def test_global_router_loss_counts_the_micro_batches_of_a_step(tmp_path):
    """With two of them, the second's shares are those of both; written out by hand."""
    model = router_model()
    rows = dataset()
    counts = tokens = 0.0
    for at in (0, 4):
        batch = stacked(rows[at : at + 4])
        output = model(**batch, use_cache=False)
        more, probabilities, n = routing_sums(output.router_logits, 2, batch["attention_mask"])
        counts, tokens = counts + more, tokens + n
        loss = output.loss - COEFFICIENT * output.aux_loss
        (loss + COEFFICIENT * balance(counts / tokens, probabilities / n)).div(2).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert not wrong(trained_gradients(tmp_path, 2, [GlobalRouterLossCallback()]), expected)
    assert wrong(trained_gradients(tmp_path, 2, [RouterLossCallback()]), expected, bound=1e-3)


def test_evaluation_and_a_second_callback(tmp_path):
    class Evaluating(Trainer):
        def train(self):
            self.losses = [self.evaluate(dataset())["eval_loss"] for _ in range(2)]

    trainers = []

    class Kept(Evaluating):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    callbacks = [RouterLossCallback(), RouterLossCallback()]
    trained_gradients(tmp_path, 1, callbacks, Kept, per_device_eval_batch_size=4)
    rows = dataset()
    with torch.no_grad():
        model = router_model().eval()
        parts = [model(**stacked(rows[at : at + 4]), use_cache=False).loss for at in (0, 4)]
    assert trainers[0].losses == pytest.approx([torch.stack(parts).mean().item()] * 2, rel=1e-5)


def test_a_loss_of_the_trainers_own_has_no_router_loss(tmp_path):
    smoothing = dict(label_smoothing_factor=0.1)
    plain = trained_gradients(tmp_path, 2, **smoothing)
    ours = trained_gradients(tmp_path, 2, [RouterLossCallback()], **smoothing)
    assert all(torch.equal(ours[n], g) for n, g in plain.items())


def test_tuples(tmp_path):
    model = router_model()
    RouterLossCallback().install(model)
    batch = stacked(dataset())
    with pytest.raises(ValueError, match="config.return_dict=True"):
        model(**batch, return_dict=False, use_cache=False)
    model.config.output_router_logits = False
    model(**batch, return_dict=False, use_cache=False)


def test_sft_trainer_stays_as_it_is(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")

    def train(*callbacks):
        model = router_model()
        arguments = trl.SFTConfig(
            output_dir=tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
        )
        rows = Dataset.from_list([{"input_ids": r["input_ids"].tolist()} for r in dataset()])
        trl.SFTTrainer(
            model,
            arguments,
            train_dataset=rows,
            callbacks=list(callbacks),
            processing_class=tokenizer,
        ).train()
        return model.state_dict()

    plain, ours, over_all = train(), train(RouterLossCallback()), train(GlobalRouterLossCallback())
    assert all(torch.equal(ours[n], value) for n, value in plain.items())
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(over_all[gate], plain[gate], rtol=1e-4)


def test_refusals():
    model = families.tiny_model(families.family("qwen3_moe"))
    with pytest.raises(ValueError, match="output_router_logits=False"):
        GlobalRouterLossCallback().on_train_begin(None, None, None, model=model)
    dense = families.tiny_model(families.family("deepseek_v3"))
    with pytest.raises(ValueError, match="has no auxiliary router loss"):
        GlobalRouterLossCallback().on_train_begin(None, None, None, model=dense)
    RouterLossCallback().on_train_begin(None, None, None, model=dense)  # nothing to correct


def test_tokens_count_once(tmp_path):
    """As on two ranks that share their batches, where the Trainer's sum over ranks is doubled."""
    seen = []

    class TwoRanks(Trainer):
        def __init__(self, model, *args, **kwargs):
            model._tp_size = 1
            model.config.distributed_config = DistributedConfig(fsdp_size=2, sp_size=2)
            super().__init__(model, *args, **kwargs)

        def _track_num_input_tokens(self, inputs):
            for _ in range(2):
                super()._track_num_input_tokens(inputs)

        def train(self):
            super().train()
            seen.append(self.state.num_input_tokens_seen)

    for callbacks in ([TokenCountCallback()], []):
        options = dict(include_num_input_tokens_seen="all")
        trained_gradients(tmp_path, 2, callbacks, TwoRanks, **options)
    assert seen == [SEQUENCES * 12, 2 * SEQUENCES * 12]


def test_ranks_that_share_a_batch():
    model = families.tiny_model(families.family("qwen3_moe"))
    assert batch_replicas(model) == 1
    model._tp_size = 4
    assert batch_replicas(model) == 4


def test_callbacks_by_name(tmp_path):
    register()
    names = ["moe_telemetry", "global_router_loss", "token_counts", "finite_check"]
    arguments = TrainingArguments(output_dir=tmp_path, report_to=names, use_cpu=True)
    callbacks = Trainer(router_model(), arguments).callback_handler.callbacks
    classes = [GlobalRouterLossCallback, TokenCountCallback, FiniteCheckCallback]
    assert [type(c) for c in callbacks if type(c) in classes] == classes
