"""Telemetry: exact token counts, expert loads and MFU, and that every reporter receives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_moe_ep.training import (
    FlopCount,
    MoETelemetryCallback,
    batch_replicas,
    peak_tflops,
    register,
)
from hf_moe_ep.training.batch_tokens import TokenCounter, documents
from hf_moe_ep.training.expert_load import ExpertLoadSampler, summarise
from hf_moe_ep.training.flops import AttentionTerm, count_flops
from hf_moe_ep.training.telemetry import STATE_KEY, training_totals
from tests import families

LENGTHS = [5, 7, 9, 4, 6, 3, 8, 2]  # tokens of the samples, in training order: 44 in all


# What a batch holds


def test_right_padding():
    docs = documents(
        {
            "input_ids": torch.tensor([[7, 8, 9, 0, 0], [7, 8, 9, 4, 5]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        }
    )
    assert docs.real.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert docs.index.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert docs.length.tolist() == [[3, 3, 3, 0, 0], [5, 5, 5, 5, 5]]


def test_left_padding_with_position_ids():
    docs = documents(
        {
            "input_ids": torch.tensor([[0, 0, 7, 8, 9]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
            "position_ids": torch.tensor([[1, 1, 0, 1, 2]]),  # what generate() fills pads with
        }
    )
    assert docs.index.tolist() == [[0, 0, 1, 2, 3]]
    assert docs.length.tolist() == [[0, 0, 3, 3, 3]]


def test_packed_row_with_padding():
    """Documents of 3 and 2 tokens and three pads, as TRL's padding-free collator lays them out."""
    batch = {
        "input_ids": torch.tensor([[7, 8, 9, 7, 8, 0, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, 8, 9, -100, 8, -100, -100, -100]]),
    }
    docs = documents(batch)
    assert docs.index.tolist() == [[1, 2, 3, 1, 2, 0, 0, 0]]
    assert docs.length.tolist() == [[3, 3, 3, 2, 2, 0, 0, 0]]
    for labels in (None, torch.tensor([1])):  # none per token: padding looks like short documents
        assert documents(batch | {"labels": labels}).real.sum() == 8


def test_no_mask_and_multi_axis_positions():
    ids = torch.ones(2, 4, dtype=torch.long)
    for extra in ({}, {"position_ids": torch.zeros(3, 2, 4, dtype=torch.long)}):
        docs = documents({"input_ids": ids, "labels": torch.full_like(ids, -100)} | extra)
        assert docs.length.tolist() == [[4] * 4] * 2
    assert documents({"inputs_embeds": torch.zeros(2, 4, 8)}).index.tolist() == [[1, 2, 3, 4]] * 2


def test_batch_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no input_ids and no inputs_embeds.*pixel_values"):
        documents({"pixel_values": torch.zeros(1)})


def test_key_sums_by_hand():
    terms = (
        AttentionTerm(1.0, None, 1, True),
        AttentionTerm(1.0, 2, 1, True),
        AttentionTerm(1.0, None, 2, True),
        AttentionTerm(1.0, None, 1, False),
    )
    counter = TokenCounter(terms, torch.device("cpu"))
    batch = {"input_ids": torch.ones(1, 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    counter.add(batch)
    # documents of 3 and 2: all keys 9 + 4; causal 6 + 3; at most 2 keys: 6 + 4 and 5 + 3; pairs of
    # tokens: 3 * 1 + 2 * 1 and 0 + 1 + 1 + 0 + 1; bidirectional 13 both times
    assert counter.sums.tolist() == [5, 13, 9, 10, 8, 5, 3, 13, 13]
    counter.add(batch)
    assert counter.sums.tolist() == [10, 26, 18, 20, 16, 10, 6, 26, 26]


# Arithmetic


def toy_count(frozen: float = 0.0) -> FlopCount:
    """1000 FLOPs of weights per token, 10 per key."""
    terms = (AttentionTerm(10.0, None, 1, True),)
    return FlopCount(400.0, 500.0, 50.0, 50.0, 0.0, terms, frozen, ())


def test_totals_by_hand():
    totals = training_totals(toy_count(), [5, 13, 9], replicas=1, seconds=2.0)
    assert (totals.seconds, totals.tokens) == (2.0, 5)
    assert totals.flops_full == 3 * (5 * 1000 + 13 * 10)
    assert totals.flops_causal == 3 * (5 * 1000 + 9 * 10)
    assert training_totals(toy_count(frozen=600.0), [5, 13, 9], 1).flops_full == (
        5 * (3 * 1000 - 600) + 3 * 130
    )


def test_a_tensor_parallel_group_counts_once():
    """Two batches of 5 tokens on 4 ranks, tp_size 2: every rank adds its own, the sums see 20."""
    assert training_totals(toy_count(), [20, 52, 36], 2) == training_totals(
        toy_count(), [10, 26, 18], 1
    )


def test_batch_replicas_reads_the_model():
    model = families.tiny_model(families.family("qwen3_moe"))
    assert batch_replicas(model) == 1
    model._tp_size = 4  # what from_pretrained(distributed_config=...) leaves
    assert batch_replicas(model) == 4


def test_device_peaks():
    assert peak_tflops("NVIDIA H200", torch.bfloat16) == 989.4
    assert peak_tflops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_tflops("NVIDIA A100-SXM4-80GB", torch.float32) == 156.0
    finally:
        torch.set_float32_matmul_precision("highest")
    assert peak_tflops("Tesla T4", torch.bfloat16) is None
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", ""):
        assert peak_tflops(unknown, torch.bfloat16) is None


# Expert load


def test_load_of_a_hand_made_routing():
    model = families.tiny_model(families.family("qwen3_moe"))
    sampler = ExpertLoadSampler(model, torch.device("cpu"))
    first, second = families.experts_modules(model).values()
    # six experts; ids of 4 tokens, top-2. An id of 6 is another rank's expert.
    skewed = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 6]])
    even = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 3]])
    x, weights = torch.randn(4, 32), torch.full((4, 2), 0.5)

    def run():
        first(x, skewed, weights)
        second(hidden_states=x, top_k_index=even, top_k_weights=weights)

    model.train()
    run()
    sampler.active = True
    model.eval()
    run()
    assert sampler.rows.sum() == 0
    model.train()
    run()
    assert sampler.rows.tolist() == [[4, 2, 1, 0, 0, 0, 1], [2, 1, 1, 2, 1, 1, 0]]
    load = summarise(sampler.rows.tolist(), sampler.experts_per_layer)
    # busiest 4 of 7 rows over 7 / 6 rows on average, and 2 of 8
    assert load.worst_max_over_mean == pytest.approx(4 * 6 / 7)
    assert load.max_over_mean == pytest.approx((4 * 6 / 7 + 2 * 6 / 8) / 2)
    assert load.idle_share == pytest.approx((3 / 6 + 0) / 2)
    sampler.remove()
    run()
    assert sampler.rows.sum() == 16


def test_load_without_rows_is_none():
    assert summarise([[0, 0, 0]], [2]) is None
    assert summarise([[0, 0, 0], [3, 1, 0]], [2, 2]).max_over_mean == 1.5  # only layers that ran


# The Trainer


class Recorder(TrainerCallback):
    """Stands for a reporter: keeps what it is given when it is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Clocked(MoETelemetryCallback):
    """Telemetry on a clock that `Ticker` moves."""

    time = 0.0

    def _now(self):
        return type(self).time


class Ticker(TrainerCallback):
    """A step takes 2 s, an evaluation 100 s, a save 1000 s."""

    def on_step_begin(self, *args, **kwargs):
        Clocked.time += 2.0

    def on_prediction_step(self, *args, **kwargs):
        Clocked.time += 100.0

    def on_save(self, *args, **kwargs):
        Clocked.time += 1000.0


def samples(lengths=LENGTHS):
    return [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in lengths]


def pad(examples):
    longest = max(len(e["input_ids"]) for e in examples)

    def column(key, value):
        return torch.tensor([e[key] + [value] * (longest - len(e[key])) for e in examples])

    ids = column("input_ids", 0)
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": (ids != 0).long()}


def trainer(tmp_path, callbacks, model=None, **arguments):
    model = families.tiny_model(families.family("qwen3_moe")) if model is None else model
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(tmp_path), **(defaults | arguments))
    data = samples()
    return Trainer(
        model, args, train_dataset=data, eval_dataset=data, data_collator=pad, callbacks=callbacks
    )


def test_every_reporter_receives_it(tmp_path, monkeypatch):
    """Built-in reporters, which stand before `callbacks=`, and the user's own."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "fake", Recorder)
    register()
    own = Recorder()
    run = trainer(tmp_path, [own], report_to=["moe_telemetry", "fake"])
    run.train()
    built_in = next(c for c in run.callback_handler.callbacks if isinstance(c, Recorder))
    assert built_in is not own
    for logs in (built_in.logs, own.logs):
        assert [log.get("tokens_seen") for log in logs] == [25, 44, 44]
        assert all("tokens_per_second" in log for log in logs[:2])
        # the first of every ten steps is sampled, so the second window has nothing to tell
        assert ["expert_idle_share" in log for log in logs] == [True, False, False]
    assert [log["tokens_seen"] for log in run.state.log_history] == [25, 44, 44]


def test_attach_puts_it_before_the_reporters(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "fake", Recorder)
    run = trainer(tmp_path, [], report_to=["fake"])
    MoETelemetryCallback(expert_load_every=1).attach(run)
    run.train()
    built_in = next(c for c in run.callback_handler.callbacks if isinstance(c, Recorder))
    assert [log["tokens_seen"] for log in built_in.logs] == [25, 44, 44]
    assert all(1 <= log["expert_load_max_over_mean"] <= 6 for log in built_in.logs[:2])


def test_a_late_place_in_report_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "fake", Recorder)
    register()
    with pytest.raises(ValueError, match="put 'moe_telemetry' before the others"):
        trainer(tmp_path, [], report_to=["fake", "moe_telemetry"])


def test_padding_and_accumulation_count_exactly(tmp_path):
    """Rows of 5 and 7, 9 and 4, ...: two micro-batches a step, the padding of none of them."""
    recorder = Recorder()
    run = trainer(
        tmp_path,
        [MoETelemetryCallback(expert_load_every=0), recorder],
        gradient_accumulation_steps=2,
        logging_steps=1,
        max_steps=2,
    )
    run.train()
    assert [log["tokens_seen"] for log in recorder.logs] == [25, 44, 44]
    assert not any("expert_load_max_over_mean" in log for log in recorder.logs)
    assert not any(key.startswith("mfu") for log in recorder.logs for key in log)  # CPU: no peak


def test_mfu_on_a_clock(tmp_path):
    """Evaluation and saving take no time and add no tokens, in the window and in the total."""
    recorder = Recorder()
    run = trainer(
        tmp_path,
        [Ticker(), Clocked(device_peak_tflops=1e-6), recorder],
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    windows = [log for log in recorder.logs if "loss" in log]
    count = count_flops(run.model)
    per_key = count.attention[0].flops_per_key
    for i, log in enumerate(windows):
        lengths = LENGTHS[4 * i : 4 * i + 4]
        weights = 3 * count.weights * sum(lengths)
        full = weights + 3 * per_key * sum(n * n for n in lengths)
        causal = weights + 3 * per_key * sum(n * (n + 1) / 2 for n in lengths)
        assert log["tokens_per_second"] == sum(lengths) / 4.0
        assert log["tflops_per_device"] == pytest.approx(full / 4.0 / 1e12)
        assert log["mfu"] == pytest.approx(full / 4.0 / 1e6)
        assert log["mfu_causal"] == pytest.approx(causal / 4.0 / 1e6)
    assert len(windows) == 2
    mean = (windows[0]["mfu"] + windows[1]["mfu"]) / 2
    assert windows[1]["mfu_cumulative"] == pytest.approx(mean)
    assert recorder.logs[-1]["mfu_cumulative"] == pytest.approx(mean)
    assert recorder.logs[-1]["mfu_causal_cumulative"] < mean


@pytest.mark.parametrize("restore", [False, True])
def test_resume_continues_the_totals(tmp_path, restore):
    arguments = {
        "save_strategy": "steps",
        "save_steps": 1,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = trainer(tmp_path, [Ticker(), Clocked(device_peak_tflops=1e-6)], **arguments)
    whole.train()
    stored = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    assert stored["stateful_callbacks"][STATE_KEY]["attributes"]["tokens"] == sum(LENGTHS[:6])
    recorder = Recorder()
    resumed = trainer(tmp_path, [Ticker(), Clocked(device_peak_tflops=1e-6), recorder], **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [log["tokens_seen"] for log in recorder.logs] == [44, 44]
    # the window holds the one step of this run, the total all four of 2 s each
    assert recorder.logs[0]["tokens_per_second"] == sum(LENGTHS[6:]) / 2.0
    last = whole.state.log_history[-1]
    assert recorder.logs[-1]["mfu_cumulative"] == pytest.approx(last["mfu_cumulative"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(tmp_path, reentrant):
    logs = []
    for checkpointing in (False, True):
        recorder = Recorder()
        run = trainer(
            tmp_path,
            [MoETelemetryCallback(expert_load_every=1), recorder],
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
            max_steps=2,
        )
        run.train()
        logs.append(recorder.logs[0])
    plain, checkpointed = logs
    assert plain["tokens_seen"] == checkpointed["tokens_seen"] == 25
    for key in ("expert_load_max_over_mean", "expert_idle_share"):
        assert plain[key] == pytest.approx(checkpointed[key])


def test_hooks_trace_into_one_graph():
    """torch.compile(fullgraph=True): batches and sampled loads as without it."""
    family = families.family("qwen3_moe")
    config = families.tiny_config(family)
    config.num_hidden_layers = 1
    model = families.model_class(family)._from_config(config, experts_implementation="batched_mm")
    families.randomise(model)
    telemetry = MoETelemetryCallback()
    telemetry._counter = TokenCounter(count_flops(model).attention, torch.device("cpu"))
    model.train().register_forward_pre_hook(telemetry._count_batch, with_kwargs=True)
    sampler = ExpertLoadSampler(model, torch.device("cpu"))
    batch = pad(samples(LENGTHS[:2]))
    sampler.active = True
    model(**batch)
    tokens, rows = telemetry._counter.sums.clone(), sampler.rows.clone()
    assert tokens.tolist() == [12, 25 + 49, 15 + 28] and rows.sum() == 14 * 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for step, active in enumerate((False, True, False, True), start=2):
        sampler.active = active
        compiled(**batch).loss.backward()
        assert torch.equal(telemetry._counter.sums, step * tokens)
        assert torch.equal(sampler.rows, (1 + step // 3 + (step == 5)) * rows)


def test_layers_compiled_one_by_one_share_their_code():
    """As torch_compile does by regions: a hook with a constant per layer would compile each anew,
    and beyond torch's limit of eight leave the rest uncompiled."""
    torch._dynamo.reset()
    family = families.family("qwen3_moe")
    config = families.tiny_config(family)
    config.num_hidden_layers = 3
    model = families.model_class(family)._from_config(config, experts_implementation="batched_mm")
    sampler = ExpertLoadSampler(model.train(), torch.device("cpu"))
    counter = CompileCounter()
    for layer in model.base_model.layers:
        layer.compile(backend=counter, fullgraph=True)
    for sampler.active in (True, False, True):
        model(**pad(samples(LENGTHS[:2])), use_cache=False)
    assert counter.frame_count == 2  # with and without sampling
    assert sampler.rows.sum(1).tolist() == [2 * 14 * 2] * 3


def test_hooks_leave_with_the_training(tmp_path):
    run = trainer(tmp_path, [MoETelemetryCallback()], max_steps=1)

    def hooks():
        return sum(len(m._forward_pre_hooks) for m in run.model.modules())

    before = hooks()
    run.train()
    assert hooks() == before


def test_only_training_forwards_count(tmp_path):
    class Generates(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model(torch.ones(1, 50, dtype=torch.long))

    recorder = Recorder()
    run = trainer(tmp_path, [Generates(), MoETelemetryCallback(), recorder], max_steps=1)
    run.train()
    assert recorder.logs[-1]["tokens_seen"] == 12


def test_data_parallel_in_one_process_is_off_with_a_warning(tmp_path, caplog):
    run = trainer(tmp_path, [], max_steps=1)
    telemetry = MoETelemetryCallback().attach(run)
    two_gpus = type("Args", (), {"n_gpu": 2})()
    telemetry.on_train_begin(two_gpus, run.state, run.control, model=run.model)
    assert "moe_telemetry is off" in caplog.text
    logs = {"loss": 1.0}
    telemetry.on_log(two_gpus, run.state, run.control, logs=logs)
    assert logs == {"loss": 1.0}


# TRL


def sft(tmp_path, callbacks, **arguments):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    defaults = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": 16,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return trl.SFTTrainer(
        families.tiny_model(families.family("qwen3_moe")),
        trl.SFTConfig(output_dir=str(tmp_path), **(defaults | arguments)),
        train_dataset=Dataset.from_list([{"input_ids": s["input_ids"]} for s in samples()]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"packing": False},
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "bfd", "pad_to_multiple_of": 32},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2},
    ],
    ids=["padded", "packed", "packed_and_padded", "wrapped", "padding_free"],
)
def test_sft_counts_exactly(tmp_path, arguments):
    recorder = Recorder()
    run = sft(tmp_path, [MoETelemetryCallback(device_peak_tflops=1.0), recorder], **arguments)
    run.train()
    logs = recorder.logs
    assert logs[-1]["tokens_seen"] == sum(LENGTHS)
    assert 0 < logs[-1]["mfu_causal_cumulative"] < logs[-1]["mfu_cumulative"]
    if arguments.get("packing_strategy") != "wrapped":  # which cuts documents into rows
        # the same documents and FLOPs however they are laid out: sums of squared lengths
        count = count_flops(run.model)
        squares = sum(n * n for n in LENGTHS)
        full = 3 * (count.weights * sum(LENGTHS) + count.attention[0].flops_per_key * squares)
        telemetry = run.callback_handler.callbacks[-3]
        assert telemetry._total.flops_full == pytest.approx(full)


# Several ranks

TWO_RANKS = """
import json, os, sys
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments
from transformers.distributed import DistributedConfig
from hf_moe_ep.training import MoETelemetryCallback
from tests.integration.test_telemetry import Recorder, pad, samples, trainer

folder = sys.argv[1]
torch.set_num_threads(1)


def load(**sizes):
    kwargs = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def report(name, logs):
    if os.environ["RANK"] == "0":
        print("LOGS" + json.dumps([name, logs]))


for name, sizes in {"ddp": {}, "ep": {"fsdp_size": 2, "ep_size": 2}}.items():
    recorder = Recorder()
    callbacks = [MoETelemetryCallback(expert_load_every=1), recorder]
    run = trainer(folder, callbacks, model=load(**sizes), logging_steps=1, max_steps=2)
    run.train()
    report(name, recorder.logs)

# Accelerate refuses Trainer + tensor parallelism on CPU, so the callback gets its events by hand.
model, telemetry = load(tp_size=2).train(), MoETelemetryCallback(expert_load_every=1)
args = TrainingArguments(folder, use_cpu=True)
state, control = TrainerState(global_step=0, log_history=[{}]), TrainerControl()
telemetry.on_train_begin(args, state, control, model=model)
telemetry.on_step_begin(args, state, control)
model(**pad(samples()[:4])).loss.backward()
state.global_step, logs = 1, {"loss": 0.0}
telemetry.on_step_end(args, state, control)
telemetry.on_log(args, state, control, logs=logs)
report("tp", [logs])
torch.distributed.destroy_process_group()
"""


def test_two_ranks(tmp_path):
    """Data parallel and expert parallel ranks have batches of their own, a tp group shares one."""
    families.tiny_model(families.family("qwen3_moe")).save_pretrained(tmp_path)
    (tmp_path / "run.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGS")]
    logs = dict(json.loads(line.removeprefix("LOGS")) for line in lines)
    assert [log["tokens_seen"] for log in logs["ddp"]] == [25, 44, 44]
    assert [log["tokens_seen"] for log in logs["ep"]] == [25, 44, 44]
    assert [log["tokens_seen"] for log in logs["tp"]] == [25]
    for layout in ("ddp", "ep", "tp"):
        log = logs[layout][0]
        assert log["tokens_per_second"] == pytest.approx(2 * log["tokens_per_second_per_device"])
        # the same four rows and weights; how they are padded differs between one batch and two
        if layout == "ep":
            for key in ("expert_load_max_over_mean", "expert_idle_share"):
                assert log[key] == pytest.approx(logs["ddp"][0][key])


def test_imports_without_trl():
    code = """
import sys
sys.modules["trl"] = sys.modules["datasets"] = sys.modules["peft"] = None  # import raises
import hf_moe_ep.training
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_negative_sampling_is_refused():
    with pytest.raises(ValueError, match="expert_load_every=-1"):
        MoETelemetryCallback(expert_load_every=-1)
