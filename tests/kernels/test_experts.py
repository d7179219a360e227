"""The whole operator: forward and every gradient against fp64 on every edge case.

Fused, and with a gate as written.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmoe
from benchmarks.problems import EDGE, OF_GPT_OSS, Problem, make_inputs
from fastmoe import decode
from tests.kernels.common import DEVICE, DTYPES, assert_as_good_as_torch, gate_of, run

SMALL = EDGE[0]
BY_NAME = {p.name: p for p in EDGE}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", EDGE, ids=lambda p: p.name)
def test_fused(p, dtype):
    inputs = make_inputs(p, dtype, DEVICE)
    assert_as_good_as_torch(run(fastmoe.fused_experts, p, inputs), p, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("inner", "options"),
    [
        (160, {}), (128, dict(transposed=True)), (132, {}), (160, dict(bias=True)),
        (192, dict(interleaved=True)), (264, dict(gate="gelu", interleaved=True, bias=True)),
        (192, OF_GPT_OSS),
    ],
    ids=str,
)  # fmt: skip
def test_many_rows_an_expert(inner, options, dtype):
    """Several tiles of an expert, the last one whole, half and less; columns past a tile's end."""
    p = Problem("many", 700, 192, inner, 4, 2, sentinels=0.1, skew=1.0, **options)
    inputs = make_inputs(p, dtype, DEVICE)
    assert_as_good_as_torch(run(fastmoe.fused_experts, p, inputs), p, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_leaves_what_is_not_finite_with_its_expert(dtype):
    """Steps of the weight gradients reach past an expert's last row, to the next one's first."""
    p = Problem("neighbours", 300, 64, 64, 3, 1)
    inputs = make_inputs(p, dtype, DEVICE)
    clean = run(fastmoe.fused_experts, p, inputs)
    inputs.x[(inputs.top_k_index[:, 0] == 1).nonzero()[0]] = float("inf")
    got = run(fastmoe.fused_experts, p, inputs)
    for name in ("up", "down"):
        assert not got[name][1].isfinite().all()
        assert torch.equal(got[name][::2], clean[name][::2]), name


# More than a program has in flight at once: of one expert's columns, or of experts.
DEEP = (
    replace(BY_NAME["gpt_oss"], name="deep_transposed", H=260, I=520, K=1),
    replace(BY_NAME["bias"], name="deep_top17", H=17, I=10, K=17),
)
BY_NAME |= {p.name: p for p in DEEP}
DECODE_NAMES = [
    "small", "gpt_oss_sentinels", "odd_sizes", "transposed_odd", "ungated_silu_bias",
    "deep_transposed", "deep_top17",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", DECODE_NAMES)
def test_fused_for_a_few_tokens(name, tokens, dtype):
    tokens = min(tokens, 32 // BY_NAME[name].K)
    p = replace(BY_NAME[name], T=tokens, E=64)
    inputs = make_inputs(p, dtype, DEVICE)
    on_triton = fastmoe.backend_name(inputs.x) == "triton"
    assert decode.serves(inputs.x, tokens * p.K, p.E) == on_triton
    args = (inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    options = dict(
        gate=gate_of(p),
        up_bias=inputs.up_bias,
        down_bias=inputs.down_bias,
        is_transposed=p.transposed,
    )
    with torch.no_grad():
        out, again = (fastmoe.fused_experts(*args, **options) for _ in range(2))
    assert torch.equal(out, again)
    assert_as_good_as_torch({"out": out}, p, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["small", "sentinels", "no_tokens", "gpt_oss_sentinels", "ungated_silu_bias"]
)
def test_gate_as_written(name, dtype):
    p = BY_NAME[name]
    inputs = make_inputs(p, dtype, DEVICE)
    gate = gate_of(p)
    got = run(fastmoe.fused_experts, p, inputs, gate=lambda h: gate(h))
    assert_as_good_as_torch(got, p, inputs)


@pytest.mark.parametrize("name", ["small", "sentinels"])
def test_post_norm_with_parameters(name):
    p = BY_NAME[name]
    inputs = make_inputs(p, torch.float32, DEVICE)
    scale = torch.randn(p.H, device=DEVICE, requires_grad=True)

    def norm(y):
        return torch.nn.functional.rms_norm(y, (p.H,)) * scale.to(y.dtype)

    got = run(fastmoe.fused_experts, p, inputs, post_norm=norm)
    assert_as_good_as_torch(got, p, inputs, post_norm=norm)
    grads = []
    for function in (fastmoe.fused_experts, fastmoe.reference_experts):
        out = function(
            inputs.x,
            inputs.top_k_index,
            inputs.top_k_weights,
            inputs.up,
            inputs.down,
            post_norm=norm,
        )
        grads.append(torch.autograd.grad(out, scale, inputs.grad)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    T=st.integers(0, 70), H=st.integers(4, 50), I=st.integers(4, 40),
    E=st.integers(1, 12), K=st.integers(1, 4), sentinels=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(), transposed=st.booleans(), interleaved=st.booleans(),
    gate=st.sampled_from(["silu", "gelu", "relu", "clamped"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes(T, H, I, E, K, sentinels, bias, transposed, interleaved, gate, seed):  # noqa: E741
    p = Problem(
        "random", T, H, I, E, min(K, E), sentinels=sentinels, gate=gate,
        bias=bias, transposed=transposed, interleaved=interleaved,
    )  # fmt: skip
    inputs = make_inputs(p, torch.float32, DEVICE, seed)
    assert_as_good_as_torch(run(fastmoe.fused_experts, p, inputs), p, inputs)


def test_sentinel_gradients_are_exactly_zero():
    p = BY_NAME["sentinels"]
    inputs = make_inputs(p, torch.float32, DEVICE)
    inputs.top_k_index[:5] = p.E  # tokens with no expert here at all
    got = run(fastmoe.fused_experts, p, inputs)
    sentinel = inputs.top_k_index >= p.E
    assert (got["top_k_weights"][sentinel] == 0).all() and (
        got["top_k_weights"][~sentinel] != 0
    ).all()
    assert (got["x"][:5] == 0).all() and (got["out"][:5] == 0).all()


@pytest.mark.parametrize("gate", [None, "as written"])
@pytest.mark.parametrize("name", ["sentinels", "gpt_oss_sentinels"])
def test_sentinels_that_were_counted_take_no_buffer_and_change_no_bit(name, gate):
    p = BY_NAME[name]
    inputs = make_inputs(p, DTYPES[0], DEVICE)
    known = gate_of(p)
    options = {"gate": lambda h: known(h)} if gate else {}
    routing = fastmoe.route_experts(inputs.x, inputs.top_k_index, p.E)
    routing = routing.cut(int(routing.offsets[-1]))
    assert routing.perm.numel() < inputs.top_k_index.numel()
    want = run(fastmoe.fused_experts, p, inputs, **options)
    got = run(fastmoe.fused_experts, p, inputs, routing=routing, **options)
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("name", ["small", "gpt_oss_sentinels"])
def test_repeated_runs_give_the_same_bits(name):
    p = BY_NAME[name]
    inputs = make_inputs(p, DTYPES[0], DEVICE)
    first, second = (run(fastmoe.fused_experts, p, inputs) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_int32_ids_and_strided_inputs():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    expected = run(fastmoe.fused_experts, SMALL, inputs)
    ids = inputs.top_k_index.int().repeat_interleave(2, dim=1)[:, ::2]
    x = inputs.x.repeat_interleave(2, dim=0)[::2]
    weights = inputs.top_k_weights.repeat_interleave(2, dim=1)[:, ::2]
    views = [
        w.mT.contiguous().mT for w in (inputs.up, inputs.down)
    ]  # the transposed layout in memory
    assert not (ids.is_contiguous() or x.is_contiguous() or views[0].is_contiguous())
    out = fastmoe.fused_experts(x, ids, weights, *views)
    torch.testing.assert_close(out, expected["out"], rtol=1e-5, atol=1e-5)
    sliced = torch.cat([inputs.up, inputs.up], dim=2)[..., : SMALL.H]
    out = fastmoe.fused_experts(x, ids, weights, sliced, inputs.down)
    torch.testing.assert_close(out, expected["out"], rtol=1e-5, atol=1e-5)


def test_activations_are_cast_to_the_weights_dtype():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    half = make_inputs(SMALL, torch.bfloat16, DEVICE)
    x = inputs.x.requires_grad_()
    out = fastmoe.fused_experts(x, inputs.top_k_index, inputs.top_k_weights, half.up, half.down)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 has no kernels; the CPU path serves it")
def test_gradcheck_in_double_precision():
    p = BY_NAME["gpt_oss_sentinels"]
    p = Problem(
        "tiny",
        5,
        4,
        3,
        3,
        2,
        sentinels=0.3,
        bias=True,
        gate="clamped",
        interleaved=True,
        transposed=True,
    )
    inputs = make_inputs(p, torch.float64, DEVICE)
    leaves = [t.requires_grad_() for t in inputs.leaves().values()]

    def f(x, weights, up, down, up_bias, down_bias):
        return fastmoe.fused_experts(
            x, inputs.top_k_index, weights, up, down, gate=gate_of(p), up_bias=up_bias,
            down_bias=down_bias, is_transposed=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, leaves)
