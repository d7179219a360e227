"""Checkpoints in one process: what is refused, by which file, and the export in the hub's names."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_moe_ep.cli import __main__ as cli
from hf_moe_ep.training import export_checkpoint, export_model, load_checkpoint, save_checkpoint
from tests import families


def tiny(name="qwen3_moe"):
    return families.tiny_model(families.family(name))


def optimizer_of(model, cls=torch.optim.AdamW):
    optimizer = cls(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 128, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture
def saved(tmp_path):
    model = tiny()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    save_checkpoint(tmp_path / "saved", model, optimizer, scheduler, {"step": 1})
    return tmp_path / "saved"


def refusal(saved, model, optimizer=None):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(saved, model, optimizer)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return str(error.value)


def test_every_file_is_guarded(saved):
    model = tiny()
    optimizer = optimizer_of(model)
    files = [p for p in saved.rglob("*") if p.is_file() and p.name != "manifest.json"]
    kinds = {"rank_0.pt", "scheduler.pt", ".metadata", "__0_0.distcp"}
    assert {p.name for p in files} == kinds | {"shard-00001-model-00001-of-00001.safetensors"}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        assert f"{path} is damaged" in refusal(saved, model, optimizer)
        path.unlink()
        assert f"{path} is missing" in refusal(saved, model, optimizer)
        path.write_bytes(content)
    assert load_checkpoint(saved, model, optimizer) == {"step": 1}


def test_another_model_or_optimizer_is_named(saved):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    smaller, larger, other = tiny(), tiny(), tiny()
    del smaller.model.layers[1]
    assert "is not in the model; it is of another model" in refusal(saved, smaller)
    larger.extra = torch.nn.Linear(2, 2)
    assert "extra.weight of the model is missing" in refusal(saved, larger)
    experts = other.get_submodule(name.rpartition(".")[0])
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[1:].detach().clone())
    assert f"{name} has shape" in refusal(saved, other)
    plain = saved.with_name("plain")
    model = tiny()
    save_checkpoint(plain, model, optimizer_of(model, torch.optim.SGD))
    assert "step of the optimizer is missing" in refusal(plain, model, optimizer_of(model))
    weights = saved.with_name("weights")
    save_checkpoint(weights, tiny())
    assert "holds no optimizer" in refusal(weights, model, optimizer_of(model))


@pytest.mark.parametrize("rates", [(0.01, 0.01), (0.01, 0.02)])
def test_a_scheduler_for_other_groups(tmp_path, rates):
    """A layout makes a group per mesh: two for one, with one learning rate or with two."""

    def run(*groups):
        optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in groups])
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return optimizer, warmup

    model = torch.nn.Linear(3, 3)
    optimizer, scheduler = run((model.weight, rates[0]), (model.bias, rates[1]))
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        scheduler.step()
    save_checkpoint(tmp_path / "saved", model, optimizer, scheduler)
    optimizer.zero_grad()
    optimizer, scheduler = run(([model.weight, model.bias], 0.5))
    if rates[0] != rates[1]:
        with pytest.raises(ValueError, match="2 parameter groups with base_lrs"):
            load_checkpoint(tmp_path / "saved", model, optimizer, scheduler)
        return
    load_checkpoint(tmp_path / "saved", model, optimizer, scheduler)
    assert scheduler.get_last_lr() == [rates[0] / 4]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == rates[0] / 5


def test_a_folder_is_written_once(saved):
    with pytest.raises(ValueError, match="exists; save to another folder"):
        save_checkpoint(saved, tiny())


def test_tied_weights(tmp_path):
    model = tiny("qwen3_moe")
    config = model.config
    config.tie_word_embeddings = True
    model = type(model)._from_config(config)
    families.randomise(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_checkpoint(tmp_path / "saved", model, optimizer_of(model))
    other = type(model)._from_config(config)
    load_checkpoint(tmp_path / "saved", other, optimizer_of(other))
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    config.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    model.save_pretrained(tmp_path / "want")
    export_model(model, tmp_path / "got")
    assert tensors_in(tmp_path / "want").keys() == tensors_in(tmp_path / "got").keys()


def tensors_in(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


# Per-expert names on the hub, tied embeddings, biases and transposed weights, renamed modules.
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "minimax_m2", "glm4_moe", "jamba"]


OTHERS = [f.name for f in families.tested() if f.name not in FAMILIES]


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.grid) for name in OTHERS)]
)
def test_the_export_is_what_save_pretrained_writes(tmp_path, name):
    model = tiny(name)
    model.save_pretrained(tmp_path / "want")
    export_model(model, tmp_path / "got")
    want, got = tensors_in(tmp_path / "want"), tensors_in(tmp_path / "got")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert [p.name for p in (tmp_path / "got").iterdir()] == ["model.safetensors"]


def test_export_in_several_files(tmp_path, saved):
    with torch.device("meta"):
        names_only = tiny()
    model = tiny()
    load_checkpoint(saved, model)
    out = tmp_path / "out"
    export_checkpoint(saved, names_only, out, max_shard_size=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) == 3
    assert index["weight_map"].keys() == tensors_in(out).keys()
    model.config.save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_export_command(tmp_path, saved, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(saved), str(out)]) == 2
    assert f"{saved / 'config.json'} is missing" in capsys.readouterr().err
    model = tiny()
    load_checkpoint(saved, model)
    model.save_pretrained(tmp_path / "want")
    shutil.copy(tmp_path / "want/config.json", saved)
    assert cli.main(["export", str(saved), str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    want, got = tensors_in(tmp_path / "want"), tensors_in(out)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert cli.main(["export", str(tmp_path / "want"), str(out)]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err
