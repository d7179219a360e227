"""`accumulate_in_place`: the gradients of micro-batches, added in the experts' own kernels."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.distributed import HashStore, init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import hf_moe_ep  # noqa: F401  (registers "fastmoe")
from hf_moe_ep.training import AccumulateInPlaceCallback, accumulate_in_place, register
from tests.distributed.ranks import run_ranks
from tests.families import family, tiny_inputs, tiny_model

STEPS = 8


def model_of(name="qwen3_moe", implementation="fastmoe", dtype=torch.float32):
    return tiny_model(family(name), implementation).to(dtype).train()


def micro_batches(model):
    ids = tiny_inputs(model)["input_ids"]
    return [ids.roll(n, -1) for n in range(STEPS)]


def backward(model, ids):
    loss_of(model, ids).backward()


def loss_of(model, ids):
    return model(input_ids=ids)[0].square().mean()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def accumulated(model):
    for ids in micro_batches(model):
        backward(model, ids)
    return gradients(model)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


# The default layout; transposed with biases; a norm after each expert, which runs as written.
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "muse_spark"])
@pytest.mark.parametrize("implementation", ["fastmoe", "fastmoe_lean"])
def test_eight_micro_batches_give_autograds_sum(name, implementation):
    want = accumulated(model_of(name))
    model = model_of(name, implementation)
    weights = accumulate_in_place(model)
    assert_same(accumulated(model), want)
    assert weights and all(w.grad is w.main_grad and w.grad_added_to_main_grad for w in weights)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("between", [False, True], ids=["before forward", "before backward"])
def test_gradients_start_anew_after_zero_grad(between, set_to_none):
    plain, model = model_of(), model_of()
    accumulate_in_place(model)
    for ids in micro_batches(model)[:3]:
        for m in (plain, model):
            if not between:
                m.zero_grad(set_to_none)
            loss = loss_of(m, ids)
            if between:
                m.zero_grad(set_to_none)
            loss.backward()
        assert_same(gradients(model), gradients(plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    want = accumulated(model_of())
    model = model_of()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    accumulate_in_place(model)
    assert_same(accumulated(model), want)


def test_fp32_buffers_are_nearer_to_the_sum_of_the_micro_batches():
    def experts(grads):
        return {n: g.double() for n, g in grads.items() if "experts" in n}

    plain = model_of(dtype=torch.bfloat16)
    truth = {}
    for ids in micro_batches(plain):
        plain.zero_grad()
        backward(plain, ids)
        truth = {n: truth.get(n, 0) + g for n, g in experts(gradients(plain)).items()}
    plain.zero_grad()
    model = model_of(dtype=torch.bfloat16)
    weights = accumulate_in_place(model, torch.optim.SGD(model.parameters()), torch.float32)
    wide, rounded = experts(accumulated(model)), experts(accumulated(plain))
    assert all(w.grad.dtype == torch.float32 for w in weights)
    for name, want in truth.items():
        assert (wide[name] - want).norm() < 0.1 * (rounded[name] - want).norm(), name


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_steps_from_fp32_buffers(set_to_none):
    plain, model = model_of(), model_of(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights = accumulate_in_place(model, optimizer, torch.float32)
    before = [w.detach().clone() for w in weights]
    for _ in range(2):
        accumulated(model)
        summed = [w.main_grad.clone() for w in weights]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        assert all(w.grad is w.main_grad for w in weights)
        optimizer.zero_grad(set_to_none)
    assert all(s.any() and s.dtype == torch.float32 for s in summed)
    assert not any(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert not hasattr(next(plain.parameters()), "main_grad")


def train(tmp_path, callbacks, dtype=torch.float32, **options):
    model = model_of(dtype=dtype)
    rows = [{"input_ids": row, "labels": row} for ids in micro_batches(model) for row in ids]
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4,
        max_steps=3, learning_rate=1e-3, report_to=options.get("report_to", []), use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", max_grad_norm=0.1,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks).train()
    return model


def test_trainer_gives_the_same_weights(tmp_path):
    register()
    plain = train(tmp_path, []).state_dict()
    for model in (
        train(tmp_path, [AccumulateInPlaceCallback()]),
        train(tmp_path, [], report_to=["accumulate_in_place"]),
    ):
        assert any(hasattr(p, "grad_added_to_main_grad") for p in model.parameters())
        assert_same(model.state_dict(), plain)


def test_trainer_with_fp32_buffers(tmp_path):
    plain = train(tmp_path, [], torch.bfloat16).state_dict()
    model = train(tmp_path, [AccumulateInPlaceCallback(torch.float32)], torch.bfloat16)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value, plain[name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m.requires_grad_(False), {}, "no trainable expert weights"),
        (lambda m: m.set_experts_implementation("eager"), {}, "experts_implementation='eager'"),
        (lambda m: m.bfloat16(), {"dtype": torch.float32}, "pass the optimizer"),
        (lambda m: m.bfloat16(), {"dtype": torch.float64}, "or torch.float32"),
    ],
    ids=["frozen", "eager", "optimizer", "dtype"],
)
def test_what_cannot_work_is_refused(change, options, message):
    model = model_of()
    change(model)
    with pytest.raises(ValueError, match=message):
        accumulate_in_place(model, **options)
    assert not any(hasattr(p, "main_grad") for p in model.parameters())


def test_sharded_weights_are_refused():
    model = model_of()
    experts = model.model.layers[0].mlp.experts
    with one_rank() as mesh:
        experts.down_proj = torch.nn.Parameter(distribute_tensor(experts.down_proj, mesh))
        with pytest.raises(ValueError, match="FSDP and expert parallelism"):
            accumulate_in_place(model)


@contextmanager
def one_rank():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fp32_buffers_on_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = model_of(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="several processes"):
        accumulate_in_place(model, torch.optim.SGD(model.parameters()), torch.float32)


def data_parallel(in_place: bool, bucket_view: bool):
    """The gradients of two optimizer steps of four micro-batches, and the weights after them."""
    model = model_of()
    weights = accumulate_in_place(model) if in_place else []
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grads = []
    for _ in range(2):
        for n, ids in enumerate(micro_batches(model)[torch.distributed.get_rank() :: 2]):
            with parallel.no_sync() if n < 3 else nullcontext():
                parallel(input_ids=ids)[0].square().mean().backward()
        grads.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    assert all(w.grad_added_to_main_grad for w in weights)
    return grads, model.state_dict()


def both_ways() -> None:
    want = data_parallel(in_place=False, bucket_view=False)
    for bucket_view in (False, True):
        got = data_parallel(in_place=True, bucket_view=bucket_view)
        for mine, theirs in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
            assert_same(mine, theirs)


def test_data_parallel_ranks_reduce_the_same_gradients():
    run_ranks(2, both_ways)
