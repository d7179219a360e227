"""`hf-moe-ep sft` on a tiny Qwen3-MoE and local text: alone, under torchrun, under accelerate, and
what it refuses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import _cur_sdpa_kernel_backends
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerState,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_ep import DistributedConfig
from hf_moe_ep.cli import layout, sft
from hf_moe_ep.cli.demo import data
from hf_moe_ep.plans.checks import REGIONS
from hf_moe_ep.training import CheckpointSaver

STEPS = 2
ROWS = 4  # one batch, so that every step sees the same text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and its tokenizer (tiny/), text (text.jsonl) and a config (c.yaml)."""
    place = tmp_path_factory.mktemp("sft")
    texts = [text[:400] for text in data.documents()[:ROWS]]
    tokenizer = data.train_tokenizer(texts, 280)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(place / "tiny")
    tokenizer.save_pretrained(place / "tiny")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    settings = {
        "model_name_or_path": str(place / "tiny"),
        "datasets": [{"path": "json", "data_files": str(place / "text.jsonl")}],
        "max_steps": STEPS,
        "save_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_length": 48,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "seed": 7,
        # Of each rank's own tokens, so not the same on two ranks as on one.
        "router_aux_loss_coef": 0.0,
        "adam_epsilon": 1e-4,  # the default makes full updates of gradients that are rounding
    }
    (place / "c.yaml").write_text(yaml.safe_dump(settings))
    return place


def arguments(place, *more):
    return ["--config", str(place / "c.yaml"), *more]


def logs(output):
    """The training logs of a run that saved a checkpoint at its last step."""
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


def launch(*command):
    """Runs `python -m command` with one thread, this checkout and no network."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sdpa_order():
    return [b.name for b in _cur_sdpa_kernel_backends(with_priority=True)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def single(place):
    """The logs of one process, through a YAML file, with the calls that fastmoe got and the order
    of attention's backends in them."""
    calls = []
    real = ALL_EXPERTS_FUNCTIONS["fastmoe"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SFT_TEST", raising=False)
        patch.setitem(
            ALL_EXPERTS_FUNCTIONS._local_mapping,
            "fastmoe",
            lambda *a, **k: calls.append((a[1].shape, sdpa_order())) or real(*a, **k),
        )
        flags = ["--output_dir", str(place / "single"), "--sdpa_backend", "flash"]
        assert sft.main(arguments(place, *flags)) == 0
    return logs(place / "single"), calls


def test_one_process_trains_with_fastmoe(place, single):
    found, calls = single
    assert len(calls) == STEPS * 2  # layers
    assert [log["step"] for log in found] == list(range(1, STEPS + 1))
    assert found[-1]["loss"] < found[0]["loss"]
    before = AutoModelForCausalLM.from_pretrained(place / "tiny")
    after = AutoModelForCausalLM.from_pretrained(place / "single")
    name = "model.layers.1.mlp.experts.down_proj"
    change = after.get_parameter(name) - before.get_parameter(name)
    assert 1e-4 < change.abs().max() < 1e-2  # AdamW at 1e-3, two steps


def test_attention_tries_the_backend_that_was_named(single):
    flash_first = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    assert all(order == flash_first for _, order in single[1])
    assert sdpa_order() != flash_first  # only while it trains


def test_telemetry_is_on(single):
    for log in single[0]:
        assert log["tokens_per_second"] > 0
    assert single[0][-1]["tokens_seen"] == pytest.approx(single[0][-1]["num_tokens"])


def test_eager_gives_the_same_losses(place, single):
    more = ("--output_dir", str(place / "eager"), "--experts_implementation", "eager")
    assert sft.main(arguments(place, *more)) == 0
    assert losses(logs(place / "eager")) == pytest.approx(losses(single[0]), abs=1e-5)


def losses(found):
    return [log["loss"] for log in found]


def torchrun(place, output, *more):
    """Two ranks with half of the experts each, which save after every step."""
    run = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    flags = ("--output_dir", str(place / output), "--ep_size", "2", "--save_steps", "1")
    flags += ("--fast_adamw", "true", "--dataloader_num_workers", "1")
    flags = arguments(place, *flags, "--per_device_train_batch_size", "2", *more)
    launch(*run, "-m", "hf_moe_ep", "sft", *flags)
    return logs(place / output), AutoModelForCausalLM.from_pretrained(place / output).state_dict()


@pytest.fixture(scope="module")
def two_ranks(place):
    return torchrun(place, "ep", "--async_save", "true")


def test_torchrun_with_expert_parallelism(place, single, two_ranks):
    found, two = two_ranks
    assert losses(found) == pytest.approx(losses(single[0]), abs=1e-4)
    one = AutoModelForCausalLM.from_pretrained(place / "single").state_dict()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=0, msg=name)


def test_a_resumed_run_is_the_one_that_never_stopped(place, two_ranks):
    checkpoint = place / "ep" / "checkpoint-1"
    found, resumed = torchrun(place, "resumed", "--resume_from_checkpoint", str(checkpoint))
    assert not (place / "resumed" / "checkpoint-1").exists()
    assert losses(found) == losses(two_ranks[0])
    assert all(torch.equal(resumed[name], value) for name, value in two_ranks[1].items())


@pytest.mark.grid
def test_resumed_with_shared_sequences(place, two_ranks):
    """In another layout: two ranks that share every sequence, so with the batch of both."""
    checkpoint = place / "ep" / "checkpoint-1"
    more = ("--sp_size", "2", "--per_device_train_batch_size", "4")
    found, resumed = torchrun(place, "shared", *more, "--resume_from_checkpoint", str(checkpoint))
    assert losses(found) == pytest.approx(losses(two_ranks[0]), abs=1e-5)
    for name, value in two_ranks[1].items():
        torch.testing.assert_close(resumed[name], value, atol=2e-5, rtol=0, msg=name)


@pytest.fixture
def checkpoint(place, tmp_path):
    """A folder like one that a Trainer's rank saved, the newest of two in its output_dir."""
    folder = tmp_path / "out" / "checkpoint-20"
    (folder.parent / "checkpoint-3").mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(place / "tiny")

    def write_state(incomplete):
        TrainerState().save_to_json(str(incomplete / "trainer_state.json"))

    CheckpointSaver().save(folder, model, write_more=write_state)
    return folder


def resumes_from(place, monkeypatch, output, what):
    _, training, model, _, ours = prepared(place, "--ep_size", "2", "--output_dir", str(output))
    training.resume_from_checkpoint = what
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        sft.set_model_init_kwargs(training, model, ours)
    sft.find_checkpoint(training)
    return training.resume_from_checkpoint


def test_which_checkpoint_to_resume_from(place, checkpoint, tmp_path, monkeypatch):
    out, new = checkpoint.parent, tmp_path / "new"
    for what in ("true", True, "auto", str(checkpoint)):
        assert resumes_from(place, monkeypatch, out, what) == str(checkpoint)
    assert resumes_from(place, monkeypatch, out, None) is None
    assert resumes_from(place, monkeypatch, new, "auto") is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        resumes_from(place, monkeypatch, new, "true")


def test_a_checkpoint_that_cannot_be_resumed_from(place, checkpoint, tmp_path, monkeypatch):
    def refusal(folder):
        with pytest.raises(ValueError) as error:
            resumes_from(place, monkeypatch, tmp_path, str(folder))
        return str(error.value)

    shard = checkpoint / "shard-00001-model-00001-of-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert f"{shard} has" in refusal(checkpoint)
    shard.unlink()
    assert f"{shard} is missing" in refusal(checkpoint)
    (checkpoint / "manifest.json").write_text("{}")
    assert f"{checkpoint / 'manifest.json'}: not the manifest" in refusal(checkpoint)
    assert "tiny/manifest.json does not exist" in refusal(place / "tiny")


def test_accelerate_launch(place, single):
    more = ("--output_dir", str(place / "accelerate"))
    run = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    more = arguments(place, *more)
    launch(*run, "--mixed_precision", "no", "-m", "hf_moe_ep.cli.sft", *more)
    assert losses(logs(place / "accelerate")) == pytest.approx(losses(single[0]), abs=1e-5)


def prepared(place, *more):
    parser = sft.make_parser()
    argv = sft.refuse_unknown(parser, arguments(place, *more))
    return parser.parse_args_and_config(argv)


def test_flags_override_the_file_and_its_env_is_set(place, monkeypatch):
    monkeypatch.setenv("SFT_TEST", "before")
    config = yaml.safe_load((place / "c.yaml").read_text()) | {"env": {"SFT_TEST": "after"}}
    (place / "env.yaml").write_text(yaml.safe_dump(config))
    _, training, *_ = sft.prepare([f"--config={place / 'env.yaml'}", "--max_steps", "5"])
    assert (training.max_steps, training.learning_rate) == (5, 1e-3)
    assert os.environ["SFT_TEST"] == "after"
    assert training.model_init_kwargs == {"experts_implementation": "fastmoe"}
    assert training.report_to == ["moe_telemetry"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ([], True),
        (["--activation_checkpointing_kwargs", '{"every_n_layers": 2}'], True),
        (["--activation_checkpointing", "false"], False),
        (["--activation_checkpointing_kwargs", '{"use_reentrant": true}'], False),
        (["--activation_checkpointing_kwargs", '{"selective": true}'], False),
        (["--torch_compile", "true"], False),
    ],
)
def test_the_routing_is_kept_where_activations_are_recomputed(place, flags, kept):
    argv = arguments(place, "--activation_checkpointing", "true", *flags)
    _, training, *_ = sft.prepare(argv)
    assert ("keep_routing" in training.report_to) == kept


def test_telemetry_comes_before_the_chosen_reporters(place):
    config = yaml.safe_load((place / "c.yaml").read_text())
    config["report_to"] = ["tensorboard", "moe_telemetry"]
    (place / "reporters.yaml").write_text(yaml.safe_dump(config))
    _, training, *_ = sft.prepare(["--config", str(place / "reporters.yaml")])
    assert training.report_to == ["moe_telemetry", "tensorboard"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_a_local_file_is_a_dataset(place, tmp_path, ending):
    from datasets import Dataset
    from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

    path = tmp_path / f"rows.{ending}"
    rows = Dataset.from_dict({"text": ["one", "two", "three"]})
    write = {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}
    write.get(ending, lambda p: Path(p).write_text("one\ntwo\nthree\n"))(str(path))
    script, mixture = ScriptArguments(dataset_name=str(path)), DatasetMixtureConfig()
    sft.local_file_as_mixture(script, mixture)
    assert script.dataset_name is None
    assert get_dataset(mixture)["train"]["text"] == ["one", "two", "three"]


REFUSED = [
    (["--lerning_rate", "1"], "--lerning_rate (did you mean learning_rate?)"),
    (["--max_step", "3"], "--max_step (did you mean max_steps?)"),  # no guessing of short forms
    (["--config"], "--config needs the path"),
    (["--model_name_or_path", ""], "--model_name_or_path is missing"),
    (["--experts_implementation", "fastmo"], "experts_implementation='fastmo' is unknown"),
    (["--ep_size", "2"], "torchrun --nproc_per_node 2"),
    (["--ep_size", "0"], "ep_size=0"),
    (["--ep_size", "3", "--tp_size", "2"], "must be a multiple of `tp_size`"),
    (["--enable_sequence_parallel", "true"], "enable_sequence_parallel does nothing"),
    (["--ep_implementation", "all_to_all"], "ep_implementation does nothing without a layout"),
    (["--ep_implementation", "al_to_all"], "ep_implementation='al_to_all' is unknown"),
    (["--sdpa_backend", "cudn"], "sdpa_backend='cudn': choose from cudnn, flash"),
    (["--async_save", "true"], "async_save does nothing without a layout"),
    (["--model_init_kwargs", '{"experts_implementation": "eager"}'], "as a flag"),
    (["--model_init_kwargs", '{"distributed_config": {"ep_sise": 2}}'], "cannot use ep_sise"),
    (["--model_init_kwargs", '{"distributed_config": {"pp_size": 2}}'], "cannot use pp_size"),
    (["--model_init_kwargs", '{"distributed_config": {"tp_plan": "auto"}}'], "tp_plan does"),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED, ids=lambda v: " ".join(v)[:40])
def test_refused_by_name(place, capsys, flags, reason):
    argv = flags if flags == ["--config"] else arguments(place, *flags)
    assert sft.main(argv) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"expert_implementation": "eager"}, "expert_implementation (did you mean experts_"),
        ({"datasets": [{"path": "json", "data_file": "x"}]}, "data_file (did you mean data_files"),
        ({"datasets": None}, "--dataset_name is missing"),
        ({"dataset_name": __file__, "datasets": []}, "has to end in"),
    ],
)
def test_yaml_refused_by_name(place, tmp_path, capsys, change, reason):
    config = yaml.safe_load((place / "c.yaml").read_text()) | change
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    assert sft.main(["--config", str(path)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architectures", "reason"),
    [
        (["LlamaForCausalLM"], "no experts behind transformers' experts interface"),
        (None, "names no `architectures`"),
    ],
)
def test_a_model_that_cannot_use_fastmoe_is_refused(place, tmp_path, capsys, architectures, reason):
    config = LlamaConfig(num_hidden_layers=1, hidden_size=32)
    config.architectures = architectures
    config.save_pretrained(tmp_path)
    assert sft.main(arguments(place, "--model_name_or_path", str(tmp_path))) == 2
    assert reason in capsys.readouterr().err


# Flags -> the sizes that reach transformers, for 8 processes; by hand.
LAYOUTS = [
    ({}, None),
    ({"ep_size": 8}, (8, 1, 8, 1, 1)),
    ({"ep_size": 4}, (4, 1, 8, 1, 1)),
    ({"ep_size": 8, "tp_size": 8}, (8, 8, 1, 1, 1)),
    ({"ep_size": 2, "tp_size": 2}, (2, 2, 4, 1, 1)),
    ({"ep_size": 4, "dp_replicate_size": 2}, (4, 1, 4, 2, 1)),
    ({"tp_size": 2}, (1, 2, 4, 1, 1)),
    ({"sp_size": 4, "ep_size": 2}, (2, 1, 8, 1, 4)),
    ({"fsdp_size": 8}, (1, 1, 8, 1, 1)),
]


@pytest.mark.parametrize(("flags", "sizes"), LAYOUTS)
def test_fsdp_takes_what_is_left(flags, sizes):
    found = layout.layout_of(layout.FastMoEArguments(**flags), {}, 8)
    if sizes is None:
        assert found is None
    else:
        assert tuple(found[name] for name in layout.SIZES) == sizes
        assert found["ep_implementation"] == "auto" and not found["enable_sequence_parallel"]


BAD_LAYOUTS = [
    ({"ep_size": 3}, "ep_size=3"),
    ({"ep_size": 16}, "ep_size=16"),
    ({"fsdp_size": 4}, "needs 4 processes and there are 8"),
    ({"tp_size": 3}, "needs 6 processes and there are 8"),
    ({"sp_size": 3}, "choose sp_size among"),
    ({"sp_size": 2, "tp_size": 2}, "use sp_size with tp_size=1"),
    ({"ep_size": 8, "ep_implementation": "all_reduce"}, "needs ep_size == tp_size"),
]


@pytest.mark.parametrize(("flags", "reason"), BAD_LAYOUTS)
def test_bad_layout_is_refused(flags, reason):
    with pytest.raises(ValueError, match=reason):
        layout.layout_of(layout.FastMoEArguments(**flags), {}, 8)


def test_layout_reaches_the_model(place, monkeypatch):
    _, training, model, _, ours = prepared(place, "--ep_size", "4", "--sp_size", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    training.model_init_kwargs = {"distributed_config": {"fsdp_cpu_offload": True}}
    sft.set_model_init_kwargs(training, model, ours)
    config = training.model_init_kwargs["distributed_config"]
    assert config == DistributedConfig(ep_size=4, fsdp_size=4, sp_size=2, fsdp_cpu_offload=True)
    written = json.loads(training.to_json_string())["model_init_kwargs"]["distributed_config"]
    assert written == config.to_dict() and written["sp_size"] == 2


@pytest.mark.parametrize(
    ("flags", "env", "reason"),
    [
        (["--ep_size", "8"], {}, "choose ep_size among"),  # 4 experts
        (["--tp_size", "8"], {}, "choose tp_size among"),  # 2 key-value heads
        (["--sp_size", "8"], {}, "choose sp_size among"),  # 4 heads
        (["--ep_size", "4"], {"ACCELERATE_USE_FSDP": "true"}, "shard again"),
        (["--ep_size", "4", "--optim", "adafactor"], {}, "adamw_torch_fused"),
        (["--ep_size", "4", "--torch_compile", "true"], {REGIONS: "true"}, "leave it out"),
        (["--ep_size", "4", "--use_peft", "--lora_target_modules", "all-linear"], {}, "experts"),
        (["--tp_size", "2", "--use_peft", "--lora_target_modules", "o_proj"], {}, "by rows"),
        (["--tp_size", "2", "--use_peft", "--lora_target_modules", "q_proj"], {}, "under both"),
        (
            ["--tp_size", "2", "--ep_size", "2", "--fsdp_size", "4", "--ep_implementation"]
            + ["all_reduce", "--experts_implementation", "eager"],
            {},
            "hangs",
        ),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused(place, monkeypatch, flags, env, reason):
    _, training, model, _, ours = prepared(place, *flags)
    for name, value in ({"WORLD_SIZE": "8"} | env).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        sft.set_model_init_kwargs(training, model, ours)


def test_a_size_is_given_once(place, monkeypatch):
    ours = layout.FastMoEArguments(ep_size=4)
    assert layout.take_sizes(ours, {"ep_size": 4, "tp_size": 2, "fsdp_plan": {}}) == {
        "fsdp_plan": {}
    }
    assert (ours.ep_size, ours.tp_size) == (4, 2)
    with pytest.raises(ValueError, match="ep_size is 2 .* and 4 as a flag"):
        layout.take_sizes(ours, {"ep_size": 2})


def test_tokens_of_shared_batches_count_once(place):
    _, training, *_ = sft.prepare(arguments(place, "--include_num_input_tokens_seen", "yes"))
    assert training.report_to == ["moe_telemetry", "token_counts"]
