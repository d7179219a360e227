"""Trainer on a sharded model: stopped and resumed it takes the very steps it would have taken."""

import shutil

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_moe_ep.training import ShardedCheckpointMixin
from hf_moe_ep.training.checkpoint_files import read_manifest
from tests import families
from tests.distributed.ranks import run_ranks

STEPS, STOP = 4, 2
DAMAGED = "shard-00002-model-00001-of-00001.safetensors"
ROWS = 12  # 3 steps an epoch: the stop is inside the first, the end inside the second


class ShardedTrainer(ShardedCheckpointMixin, Trainer):
    pass


class AsyncTrainer(ShardedCheckpointMixin, Trainer):
    async_save = True


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def rows():
    ids = torch.randint(3, 128, (ROWS, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model_dir, output, stop=STEPS, cls=ShardedTrainer, sizes=None, **changes):
    """A Trainer with dropout, two accumulation steps, and a model sharded by `sizes`."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        experts_implementation="fastmoe",
        attention_dropout=0.2,
        distributed_config=DistributedConfig(**(sizes or dict(fsdp_size=2, ep_size=2))),
    )
    arguments = dict(
        output_dir=str(output),
        max_steps=STEPS,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    return cls(
        model=model,
        args=TrainingArguments(**(arguments | changes)),
        train_dataset=rows(),
        callbacks=[StopAt(stop)],
    )


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def weights(trainer):
    found = {}
    for name, param in trainer.model.named_parameters():
        found[name] = param.full_tensor() if isinstance(param, DTensor) else param.detach()
    return found


def stop_and_resume(folder):
    whole = trainer(folder / "model", folder / "whole")
    whole.train()
    trainer(folder / "model", folder / "parts", stop=STOP, cls=AsyncTrainer).train()
    resumed = trainer(folder / "model", folder / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert sorted(losses(whole)) == [1, 2, 3, 4]
    got = weights(resumed)
    for name, want in weights(whole).items():
        assert torch.equal(got[name], want), name
    resumed.save_model(str(folder / "exported"))
    return resumed.state.global_step


class LoraTrainer(ShardedTrainer):
    def __init__(self, model, **kwargs):
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        super().__init__(model=get_peft_model(model, lora), **kwargs)


def stop_and_resume_lora(folder):
    whole = trainer(folder / "model", folder / "lora-whole", cls=LoraTrainer)
    whole.train()
    trainer(folder / "model", folder / "lora", stop=STOP, cls=LoraTrainer).train()
    resumed = trainer(folder / "model", folder / "lora", cls=LoraTrainer)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def refused(folder, name, **changes):
    """What resuming from `name` says, with nothing trained."""
    run = trainer(folder / "model", folder / "refused", **changes)
    with pytest.raises(ValueError) as error:
        run.train(resume_from_checkpoint=str(folder / name))
    assert run.state.global_step == 0
    return str(error.value)


def all_in_one_launch(folder):
    step = stop_and_resume(folder)
    stop_and_resume_lora(folder)
    if dist.get_rank() == 0:
        shutil.copytree(folder / "parts/checkpoint-4", folder / "damaged")
        flip_a_byte(folder / "damaged" / DAMAGED)
    dist.barrier()
    return step, [
        refused(folder, "damaged"),
        refused(folder, "model"),
        refused(folder, "parts/checkpoint-4", gradient_accumulation_steps=1),
    ]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    torch.manual_seed(0)
    families.tiny_model(families.family("qwen3_moe")).save_pretrained(folder / "model")
    return folder


def test_a_stop_changes_nothing(folder):
    results = run_ranks(2, all_in_one_launch, folder)
    for step, (damaged, foreign, other_batches) in results:
        assert step == STEPS
        assert f"{folder / 'damaged' / DAMAGED} is damaged" in damaged
        assert f"{folder / 'model/manifest.json'} does not exist" in foreign
        assert "with 4 samples per optimizer step and this run takes 2" in other_batches
    kept = sorted(p.name for p in (folder / "parts").iterdir())
    assert kept == ["checkpoint-3", "checkpoint-4"]  # save_total_limit
    manifest = read_manifest(folder / "parts/checkpoint-4")
    assert manifest["layout"]["ep_size"] == 2
    assert (manifest["step"], manifest["samples_per_step"], manifest["world_size"]) == (4, 4, 2)
    # With adapters, the frozen weights are not in it.
    sizes = read_manifest(folder / "lora/checkpoint-4")["files"]
    assert sizes[DAMAGED]["bytes"] < manifest["files"][DAMAGED]["bytes"] / 4
    # The checkpoint and the export load like any model, and are the same one.
    one = AutoModelForCausalLM.from_pretrained(folder / "parts/checkpoint-4").state_dict()
    two = AutoModelForCausalLM.from_pretrained(folder / "exported").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # One process goes on where two were: the same schedule, data and log.
    changes = dict(sizes=dict(fsdp_size=1), per_device_train_batch_size=2)
    alone = trainer(folder / "model", folder / "alone", **changes)
    alone.train(resume_from_checkpoint=str(folder / "parts/checkpoint-3"))
    rates = [log["learning_rate"] for log in alone.state.log_history if "loss" in log]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert alone.state.global_step == STEPS
