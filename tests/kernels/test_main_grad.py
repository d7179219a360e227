"""Weights with a `main_grad`: their gradient is added there, and autograd gets none."""

import pytest
import torch

import fastmoe
from benchmarks.problems import EDGE, make_inputs
from tests.kernels.common import DEVICE, DTYPES, error, gate_of

BY_NAME = {p.name: p for p in EDGE}
SMALL = EDGE[0]
NAMES = ["small", "no_tokens", "empty_experts", "odd_sizes", "gpt_oss_sentinels", "transposed_odd"]


def backward(p, inputs, **options):
    """The output and `.grad` of every leaf, by name."""
    for leaf in inputs.leaves().values():
        leaf.requires_grad_().grad = None
    out = fastmoe.fused_experts(
        inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down,
        up_bias=inputs.up_bias, down_bias=inputs.down_bias, is_transposed=p.transposed,
        **{"gate": gate_of(p)} | options,
    )  # fmt: skip
    out.backward(inputs.grad)
    return {"out": out.detach()} | {k: v.grad for k, v in inputs.leaves().items()}


def check(p, dtype, main_dtype, **options):
    inputs = make_inputs(p, dtype, DEVICE)
    want = backward(p, inputs, **options)
    start = {}
    for name in ("up", "down"):
        weight = getattr(inputs, name)
        weight.main_grad = torch.randn_like(weight, dtype=main_dtype)
        start[name] = weight.main_grad.clone()
    got = backward(p, inputs, **options)
    eps = torch.finfo(main_dtype).eps
    unused = torch.bincount(inputs.top_k_index[inputs.top_k_index < p.E], minlength=p.E) == 0
    for name, value in want.items():
        if name not in start:
            assert torch.equal(got[name], value), name
            continue
        weight = getattr(inputs, name)
        assert got[name] is None and weight.grad_added_to_main_grad
        truth = start[name].double() + value.double()
        rounding = eps + torch.finfo(dtype).eps  # of the sum, and of the gradient alone
        assert error(weight.main_grad, truth) <= rounding, name
        assert torch.equal(weight.main_grad[unused], start[name][unused]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fused(name, dtype):
    check(BY_NAME[name], dtype, torch.float32)
    if dtype != torch.float32:
        check(BY_NAME[name], dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["small", "gpt_oss_sentinels"])
def test_as_written(name, dtype):
    known = gate_of(BY_NAME[name])
    check(BY_NAME[name], dtype, torch.float32, gate=lambda h: known(h))


@pytest.mark.parametrize("written", [False, True], ids=["fused", "as_written"])
def test_recomputed(written):
    known = gate_of(SMALL)
    options = {"gate": lambda h: known(h)} if written else {}
    check(SMALL, DTYPES[0], torch.float32, recompute=True, **options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="sizes at which the bulk copies add need a GPU")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("main_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sizes_of_the_hopper_kernel(main_dtype, transposed):
    from dataclasses import replace

    p = replace(SMALL, T=2048, H=512, I=256, E=8, K=2, transposed=transposed, skew=1.0)
    check(p, torch.bfloat16, main_dtype)


def test_eight_micro_steps_in_fp32_are_nearer_to_the_sum_than_autograd_in_bf16():
    batches = [make_inputs(SMALL, torch.bfloat16, DEVICE, seed) for seed in range(8)]
    up, down = (batches[0].leaves()[n].detach().clone() for n in ("up", "down"))

    def accumulated(dtype, main_dtype=None):
        weights = [w.to(dtype, copy=True).requires_grad_() for w in (up, down)]
        for w in weights:
            if main_dtype:
                w.main_grad = torch.zeros_like(w, dtype=main_dtype)
        for b in batches:
            b.up, b.down = weights
            x, routing, grad = (t.to(dtype) for t in (b.x, b.top_k_weights, b.grad))
            fastmoe.fused_experts(x, b.top_k_index, routing, b.up, b.down).backward(grad)
        return [w.main_grad if main_dtype else w.grad for w in weights]

    truth = accumulated(torch.float64)
    plain = accumulated(torch.bfloat16)
    wide = accumulated(torch.bfloat16, torch.float32)
    narrow = accumulated(torch.bfloat16, torch.bfloat16)
    for name, t, p, w, n in zip(("up", "down"), truth, plain, wide, narrow, strict=True):
        assert error(w, t) < 0.9 * error(p, t), name
        assert error(n, t) < 1.1 * error(p, t), name


def test_frozen_weights_are_left_alone():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    inputs.x.requires_grad_()
    for weight in (inputs.up, inputs.down):
        weight.main_grad = torch.zeros_like(weight)
    args = (inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    fastmoe.fused_experts(inputs.x, *args).backward(inputs.grad)
    assert not inputs.up.main_grad.any() and not hasattr(inputs.up, "grad_added_to_main_grad")


def test_compiled_code_leaves_the_gradient_to_autograd():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    want = backward(SMALL, inputs)
    inputs.up.main_grad = torch.zeros_like(inputs.up)
    inputs.up.grad = inputs.down.grad = None
    args = (inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    compiled = torch.compile(fastmoe.fused_experts, fullgraph=True, backend="aot_eager")
    compiled(*args).backward(inputs.grad)
    torch.testing.assert_close(inputs.up.grad, want["up"], rtol=1e-5, atol=1e-5)
    assert not inputs.up.main_grad.any()


@pytest.mark.parametrize(
    "main_grad",
    [
        lambda w: torch.zeros_like(w)[:-1],
        lambda w: torch.zeros_like(w, dtype=torch.float16),
        lambda w: torch.zeros_like(w).mT.contiguous().mT,
        lambda w: torch.zeros_like(w, device="meta"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_a_buffer_that_does_not_fit_is_refused(main_grad):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    inputs.down.requires_grad_().main_grad = main_grad(inputs.down)
    args = (inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    with pytest.raises(ValueError, match="down.main_grad must be"):
        fastmoe.fused_experts(*args)
