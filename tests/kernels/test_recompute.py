"""`recompute=True`: the same bits as without, and nothing but x and the routing kept between."""

import pytest
import torch

import fastmoe
from benchmarks.problems import EDGE, make_inputs
from tests.kernels.common import DEVICE, DTYPES, gate_of, run

BY_NAME = {p.name: p for p in EDGE}
# Each way in which recomputing could differ: biases, layouts, no gate, rows that nobody has.
NAMES = ["small", "no_tokens", "transposed_odd", "gpt_oss_sentinels", "ungated_silu_bias"]
SMALL = EDGE[0]


def as_written(p):
    known = gate_of(p)
    return lambda h: known(h)


def saved_tensors(p, inputs, frozen=(), **options):
    """(shapes of the floats that autograd keeps besides the operands, whether it keeps x)."""
    leaves = inputs.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        fastmoe.fused_experts(
            inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down, **options
        )
    own = {t.data_ptr() for t in leaves.values()}
    floats = [t for t in saved if t.is_floating_point() and t.numel()]
    extra = [tuple(t.shape) for t in floats if t.data_ptr() not in own]
    return extra, inputs.x.data_ptr() in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name, dtype):
    p = BY_NAME[name]
    inputs = make_inputs(p, dtype, DEVICE)
    want = run(fastmoe.fused_experts, p, inputs)
    got = run(fastmoe.fused_experts, p, inputs, recompute=True)
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize(
    ("name", "norm"), [("no_tokens", False), ("gpt_oss_sentinels", True), ("small", True)]
)
def test_same_bits_as_written(name, norm):
    p = BY_NAME[name]
    inputs = make_inputs(p, DTYPES[0], DEVICE)
    options = {"gate": as_written(p)}
    if norm:
        options["post_norm"] = lambda y: torch.nn.functional.rms_norm(y, (p.H,))
    want = run(fastmoe.fused_experts, p, inputs, **options)
    got = run(fastmoe.fused_experts, p, inputs, recompute=True, **options)
    for key in want:
        assert torch.equal(got[key], want[key]), key


def test_same_bits_with_fewer_rows_than_slots():
    p = BY_NAME["sentinels"]
    inputs = make_inputs(p, DTYPES[0], DEVICE)
    routing = fastmoe.route_experts(inputs.x, inputs.top_k_index, p.E)
    routing = routing.cut(int(routing.offsets[-1]))
    want = run(fastmoe.fused_experts, p, inputs)
    got = run(fastmoe.fused_experts, p, inputs, routing=lambda: routing, recompute=True)
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("written", [False, True], ids=["fused", "as_written"])
@pytest.mark.parametrize("frozen", [(), ("up", "down"), ("x", "top_k_weights")], ids=str)
def test_keeps_x_alone(frozen, written):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    options = {"gate": as_written(SMALL)} if written else {}
    extra, _ = saved_tensors(SMALL, inputs, frozen, **options)
    assert any(shape[0] == SMALL.T * SMALL.K for shape in extra)
    extra, keeps_x = saved_tensors(SMALL, inputs, frozen, recompute=True, **options)
    assert extra == [] and (keeps_x or written)  # a checkpoint holds its arguments by itself


def test_frozen_weights_give_the_same_bits():
    inputs = make_inputs(SMALL, DTYPES[0], DEVICE)
    inputs.x.requires_grad_()
    grads = []
    for recompute in (False, True):
        args = (inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
        out = fastmoe.fused_experts(inputs.x, *args, recompute=recompute)
        grads += torch.autograd.grad(out, inputs.x, inputs.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("written", [False, True], ids=["fused", "as_written"])
def test_compiles_without_graph_breaks(written):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    options = {"gate": as_written(SMALL)} if written else {}

    def f(x, ids, weights, up, down, **kwargs):
        return fastmoe.fused_experts(x, ids, weights, up, down, recompute=True, **options)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    want = run(fastmoe.fused_experts, SMALL, inputs, **options)
    got = run(compiled, SMALL, inputs)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-5)
