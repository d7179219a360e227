"""The shipped recipes: each is read by the command it is for, and its layout fits its model."""

import os
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from hf_moe_ep import DistributedConfig, recipes
from hf_moe_ep.cli import sft
from hf_moe_ep.plans.checks import REGIONS
from hf_moe_ep.plans.memory import ModelSizes, held_parameters, memory
from hf_moe_ep.plans.model import meta_model
from hf_moe_ep.plans.search import USABLE
from tests import models

ROOT = Path(__file__).resolve().parents[2]
# Name -> the model's config, GPUs, GiB of each, (tp, fsdp, ep, sp).
TRAINING = {
    "one_gpu": ("olmoe-1b-7b", 1, 79, None),
    "one_gpu_fast": ("olmoe-1b-7b", 1, 139, None),
    "two_gpus_ep_fsdp": ("qwen3-30b-a3b", 2, 139, (1, 2, 2, 1)),
    "eight_gpus_ep_fsdp": ("qwen3-30b-a3b", 8, 79, (1, 8, 8, 1)),
    "two_gpus_long_context": ("qwen3-30b-a3b", 2, 139, (1, 2, 2, 2)),
    "eight_gpus_long_context": ("qwen3-30b-a3b", 8, 79, (1, 8, 8, 8)),
}


@cache
def model_sizes(name):
    return ModelSizes(meta_model(models.configs()[name]))


def sizes(config):
    return config.tp_size, config.fsdp_size, config.ep_size, config.sp_size


def test_every_recipe_is_here_and_in_the_wheel():
    assert recipes.names() == sorted([*TRAINING, "tp_ep_inference"])
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "recipes/*.yaml" in pyproject["tool"]["setuptools"]["package-data"]["hf_moe_ep"]


def test_names_and_paths(tmp_path):
    own = tmp_path / "one_gpu.yaml"
    own.write_text("")
    assert recipes.path(str(own)) == str(own)
    assert recipes.path("one_gpu") == recipes.path("one_gpu.yaml")
    assert Path(recipes.path("one_gpu")).parent.name == "recipes"
    assert recipes.path("no_such_recipe") == "no_such_recipe"


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_recipe_is_read_and_fits(name, tmp_path, monkeypatch):
    model_name, world, gib, layout = TRAINING[name]
    models.configs()[model_name].save_pretrained(tmp_path)
    monkeypatch.setenv(REGIONS, "false")  # a recipe's `env` is set for good
    parser = sft.make_parser()
    flags = ["--config", name, "--use_cpu", "true", "--model_name_or_path", str(tmp_path)]
    script, training, model, _, ours = parser.parse_args_and_config(
        sft.refuse_unknown(parser, flags)
    )
    assert script.dataset_name
    monkeypatch.setenv("WORLD_SIZE", str(world))
    sft.set_model_init_kwargs(training, model, ours)
    config = training.model_init_kwargs.get("distributed_config")
    assert (config if layout is None else sizes(config)) == layout
    assert model.dtype == "bfloat16"
    planned = model_sizes(model_name)
    config = config or DistributedConfig()
    tokens = training.max_length * training.per_device_train_batch_size
    accumulates = training.gradient_accumulation_steps > 1
    held = held_parameters(planned, config)
    checkpointing = training.activation_checkpointing
    assert checkpointing == (name != "one_gpu_fast")
    # Compiled layer by layer; of Liger, where it is asked for, all but its experts.
    assert training.torch_compile == (os.environ[REGIONS] == "true") == (name == "one_gpu_fast")
    assert training.liger_kernel_config == ({"swiglu": False} if training.torch_compile else None)
    assert memory(planned, config, held, tokens, checkpointing, accumulates).gib < USABLE * gib
    # Batches are made elsewhere and copied while the GPU works.
    assert training.dataloader_num_workers and training.accelerator_config.non_blocking
    text = Path(recipes.path(name)).read_text()
    started = f"torchrun --nproc-per-node {world} -m hf_moe_ep sft --config {name}\n"
    assert (started if world > 1 else f"hf-moe-ep sft --config {name}\n") in text


@pytest.mark.parametrize(("world", "layout"), [(4, (4, 1, 4, 1)), (8, (8, 1, 8, 1))])
def test_the_inference_recipe_fits(world, layout):
    settings = yaml.safe_load(Path(recipes.path("tp_ep_inference")).read_text())
    model = models.configs()["qwen3-30b-a3b"]
    config = DistributedConfig.for_model(model, world_size=world, **settings)
    assert sizes(config) == layout
    # 4 key-value heads: over 8 ranks the dense modules are replicated
    assert (config.tp_plan is None) == (world == 4)
