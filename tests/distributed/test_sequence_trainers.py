"""Trainer and TRL's trainers over sequences shared by two gloo ranks, against one process.

Compared: the step of every parameter, and what the trainers log: loss, gradient norm, metrics.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_moe_ep
from hf_moe_ep.sequence_parallel import share_batches
from tests import families
from tests.distributed.ranks import run_ranks

trl = pytest.importorskip("trl")
# In fp32 the weights' own rounding is a visible part of a step; without EP, because FSDP2 (torch
# 2.13) divides fp64 gradients of experts twice.
LOAD = {"dtype": torch.float64, "experts_implementation": "eager"}
WITH_EP = {"dtype": torch.float32, "experts_implementation": "fastmoe"}
LENGTHS = (13, 6, 9, 4, 11, 8, 5, 10) * 2


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    return [
        {"input_ids": torch.randint(3, 128, (length,), generator=generator).tolist()}
        for length in LENGTHS
    ]


def preferences() -> list[dict]:
    """Chosen and rejected answers of different lengths to one prompt."""
    made = []
    for number, row in enumerate(rows()):
        words = [str(i) for i in row["input_ids"]]
        answers = {"chosen": words[2:], "rejected": words[3:][::-1] + ["5"] * (number % 3)}
        made.append({k: " " + " ".join(v) for k, v in ({"prompt": words[:2]} | answers).items()})
    return made


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="1"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")


def pad_rows(features: list[dict]) -> dict:
    width = max(len(f["input_ids"]) for f in features)
    ids = torch.tensor([f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in features])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).int(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


def arguments(cls, folder, **more):
    return cls(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        **more,
    )


def plain_trainer(model, folder, sp_size):
    args = arguments(TrainingArguments, folder, remove_unused_columns=False)
    share_batches(args, sp_size)
    return Trainer(model, args, train_dataset=rows(), data_collator=pad_rows)


def sft_trainer(model, folder, sp_size, **more):
    from datasets import Dataset

    args = arguments(trl.SFTConfig, folder, **more)
    share_batches(args, sp_size)
    return trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer()
    )


def padding_free(model, folder, sp_size):
    return sft_trainer(model, folder, sp_size, padding_free=True, max_length=None)


def packing(model, folder, sp_size):
    return sft_trainer(model, folder, sp_size, packing=True, max_length=16)


def dpo_trainer(model, folder, sp_size):
    from datasets import Dataset

    args = arguments(trl.DPOConfig, folder, precompute_ref_log_probs=False)
    share_batches(args, sp_size)
    reference = families.tiny_model(families.family("qwen3_moe"), seed=1).double()
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(preferences()),
        processing_class=tokenizer(),
    )


LOGGED = ("loss", "grad_norm", "num_tokens", "entropy", "mean_token_accuracy", "aux_loss")


def trained(maker, model, folder, sp_size) -> dict:
    """The logs of both steps, and every parameter after them."""
    trainer = maker(model, folder, sp_size)
    trainer.train()
    logs = [
        {k: v for k, v in log.items() if k in LOGGED or k.startswith(("rewards", "logps"))}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    full = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return {"logs": logs, "parameters": full}


def on_rank(root, makers, ep_size, load):
    found = []
    for number, maker in enumerate(makers):
        config = hf_moe_ep.DistributedConfig(fsdp_size=2, ep_size=ep_size, sp_size=2)
        model = AutoModelForCausalLM.from_pretrained(root, distributed_config=config, **load)
        found.append(trained(maker, model, root / f"run{number}", 2))
    return found


@pytest.mark.parametrize(
    "makers",
    [
        pytest.param([plain_trainer, padding_free], id="Trainer, SFT"),
        pytest.param([sft_trainer, packing, dpo_trainer], id="more", marks=pytest.mark.grid),
    ],
)
def test_trainers_train_as_one_process(tmp_path, makers):
    compare(tmp_path, makers, ep_size=1, load=LOAD, bound=1e-5)


@pytest.mark.grid
def test_trainers_with_experts_parallel(tmp_path):
    compare(tmp_path, [plain_trainer, packing, dpo_trainer], ep_size=2, load=WITH_EP, bound=1e-4)


def compare(root, makers, ep_size, load, bound):
    start = families.tiny_model(families.family("qwen3_moe")).to(load["dtype"])
    start.save_pretrained(root)
    before = dict(start.named_parameters())
    got = run_ranks(2, on_rank, root, makers, ep_size, load, timeout=240)[0]
    for number, maker in enumerate(makers):
        model = AutoModelForCausalLM.from_pretrained(root, **load)
        want = trained(maker, model, root / f"one{number}", 1)
        for ours, theirs in zip(got[number]["logs"], want["logs"], strict=True):
            assert ours == pytest.approx(theirs, rel=bound), maker.__name__
        for name, parameter in want["parameters"].items():
            step = parameter - before[name]
            error = ((got[number]["parameters"][name] - parameter).norm() / step.norm()).item()
            assert error < bound, f"{maker.__name__}: {name} {error}"
