"""Compiling a step's kernels side by side (fastmoe/ahead.py): what it calls is what the step calls.

On a CPU nothing is compiled; the calls are the same.
"""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastmoe
from benchmarks.problems import OF_GPT_OSS, Problem, make_inputs
from fastmoe import ahead, ops
from fastmoe import combine as combine_file
from fastmoe import decode as decode_file
from fastmoe import grouped_gemm as gemm_file
from fastmoe.device import INTERPRETING
from tests.kernels.common import DEVICE, DTYPES, gate_of, run

PLAIN = Problem("plain", 30, 32, 48, 5, 2)
SIXTEENS = Problem("sixteens", 40, 64, 32, 48, 4, sentinels=0.3)
GPT_OSS = replace(PLAIN, name="gpt_oss", **OF_GPT_OSS)
ROUTINGS = 1  # calls beyond the step's own: routing has a form for few slots and one for many
HOST = {
    gemm_file: (
        "up_gate", "grouped_linear", "gate_backward", "weight_grad", "add_weight_grad", "bias_grad",
    ),
    combine_file: ("combine", "routing_weight_grad"),
    ops: ("_route",),
    decode_file: ("decode",),
}  # fmt: skip


def described(arg):
    """What of an argument Triton compiles for: dtypes and widths; of E what `few` keeps."""
    if isinstance(arg, torch.Tensor):
        stack = (ahead.few(arg.shape[0]),) if arg.dim() == 3 else ()
        return (arg.dtype, *stack, *arg.shape[1:])
    if isinstance(arg, fastmoe.Routing):
        return (arg.block_m, arg.top_k, ahead.few(arg.num_experts))
    return arg


@pytest.fixture
def calls(monkeypatch):
    """(in the main thread, host function, what is compiled for) of every call; ahead is on."""
    found = []
    for file, names in HOST.items():
        for name in names:
            real = getattr(file, name)

            def recording(*args, function=real, name=name):
                main = threading.current_thread() is threading.main_thread()
                found.append((main, name, tuple(map(described, args))))
                return function(*args)

            monkeypatch.setattr(file, name, recording)
    if INTERPRETING:  # it keeps the running program's number in a global
        monkeypatch.setattr(ops, "_THREADS", 1)
    monkeypatch.setattr(ahead, "_serves", lambda x: True)
    monkeypatch.setattr(ahead, "_compiled", set())
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [PLAIN, SIXTEENS, GPT_OSS], ids=lambda p: p.name)
def test_fused_step_is_compiled_ahead(p, recompute, calls, monkeypatch):
    inputs = make_inputs(p, DTYPES[0], DEVICE)
    got = run(fastmoe.fused_experts, p, inputs, recompute=recompute)
    # The backward runs in this thread on a CPU, in autograd's on a GPU: it comes after the others.
    first = next(i for i, (main, *_) in enumerate(calls) if main)
    early, step = calls[:first], calls[first:]
    assert {c[1:] for c in early} == {c[1:] for c in step}
    assert len(early) == len(step) + ROUTINGS

    calls.clear()
    again = run(fastmoe.fused_experts, p, inputs, recompute=recompute)
    assert len(calls) == len(step)  # known by now
    for name, value in got.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("p", [PLAIN, SIXTEENS, GPT_OSS], ids=lambda p: p.name)
def test_without_gradients_the_forward_and_the_decode_are_compiled_ahead(p, calls):
    inputs = make_inputs(p, DTYPES[0], DEVICE)
    options = dict(is_transposed=p.transposed, gate=gate_of(p))
    options |= dict(up_bias=inputs.up_bias, down_bias=inputs.down_bias)

    def forward():
        x, ids, weights = inputs.x, inputs.top_k_index, inputs.top_k_weights
        return fastmoe.fused_experts(x, ids, weights, inputs.up, inputs.down, **options)

    with torch.no_grad():
        got = forward()
        first = next(i for i, (main, *_) in enumerate(calls) if main)
        early, step = ({c[1:] for c in part} for part in (calls[:first], calls[first:]))
        assert step < early and {name for name, _ in early - step} == {"decode"}
        calls.clear()
        assert torch.equal(got, forward())
        assert all(main for main, *_ in calls)  # known by now


def test_each_kind_of_step_is_compiled_once(calls):
    def early(p, **frozen):
        inputs = make_inputs(p, DTYPES[0], DEVICE)
        calls.clear()
        run(fastmoe.fused_experts, p, inputs, **frozen)
        return not calls[0][0]

    assert early(PLAIN) and not early(PLAIN)
    assert not early(PLAIN.at(PLAIN.T - 1))  # as many rows an expert, roughly
    assert not early(replace(PLAIN, E=7)) and early(replace(PLAIN, E=16))
    assert early(replace(PLAIN, K=1)) and early(replace(PLAIN, gate="gelu"))


def test_frozen_weights_take_no_gradient_ahead(calls):
    inputs = make_inputs(PLAIN, DTYPES[0], DEVICE)
    x = inputs.x.requires_grad_()
    out = fastmoe.fused_experts(x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    out.sum().backward()
    assert calls and "weight_grad" not in {name for _, name, _ in calls}


def test_gradients_added_to_a_main_grad_are_compiled_ahead(calls):
    inputs = make_inputs(PLAIN, DTYPES[0], DEVICE)
    up, down = inputs.up.requires_grad_(), inputs.down.requires_grad_()
    down.main_grad = torch.zeros_like(down, dtype=torch.float32)
    out = fastmoe.fused_experts(inputs.x, inputs.top_k_index, inputs.top_k_weights, up, down)
    out.sum().backward()
    names = [name for _, name, _ in calls]
    assert names.count("add_weight_grad") == 2 and names.count("weight_grad") == 2
    assert len({c[1:] for c in calls}) == (len(calls) - ROUTINGS) / 2
    assert down.grad is None and down.main_grad.any() and up.grad is not None


def test_nothing_of_the_callers_context_is_touched(calls):
    """Checkpointing counts what is saved, and recomputes when it is read back."""
    inputs = make_inputs(PLAIN, DTYPES[0], DEVICE)

    def checkpointed(*args, **kwargs):
        return checkpoint(fastmoe.fused_experts, *args, use_reentrant=False, **kwargs)

    got = run(checkpointed, PLAIN, inputs)
    assert not calls[0][0]
    for name, value in run(fastmoe.fused_experts, PLAIN, inputs).items():
        assert torch.equal(value, got[name]), name


def test_a_failure_ahead_is_left_to_the_step(calls, monkeypatch):
    def fails(*args):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no memory")
        return real(*args)

    inputs, real = make_inputs(PLAIN, DTYPES[0], DEVICE), gemm_file.up_gate
    want = run(fastmoe.fused_experts, PLAIN, inputs)["out"]
    monkeypatch.setattr(gemm_file, "up_gate", fails)
    ahead._compiled.clear()
    assert torch.equal(run(fastmoe.fused_experts, PLAIN, inputs)["out"], want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="nothing is compiled without a GPU")
@pytest.mark.parametrize(
    ("tokens", "hidden", "options"),
    [(9, 1280, {}), (500, 1344, {}), (700, 1408, {}), (500, 1472, OF_GPT_OSS)],
)
def test_nothing_is_left_to_compile(tokens, hidden, options, monkeypatch, tmp_path):
    from triton import knobs

    def compiled(*, src, cache_hit, **kwargs):
        if not cache_hit:
            early = threading.current_thread().name.startswith("ThreadPool")
            found.append((early, src.fn.__name__))

    found = []
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", compiled)
    p = Problem("unseen", tokens, hidden, 640, 32, 4, **options)
    run(fastmoe.fused_experts, p, make_inputs(p, torch.bfloat16, DEVICE))
    assert not [name for early, name in found if not early]
    gemms = {
        "up_gate_kernel",
        "grouped_linear_kernel",
        "gate_backward_kernel",
        "weight_grad_kernel",
    }
    assert gemms <= {name for _, name in found}  # the rest another test may have compiled


@pytest.mark.parametrize(("experts", "fewer"), [(1, 1), (2, 2), (9, 2), (16, 16), (128, 16)])
def test_fewer_experts_of_the_same_kind(experts, fewer):
    assert ahead.few(experts) == fewer
