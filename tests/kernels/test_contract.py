"""What the operator promises beside its values.

Memory, frozen parts, tracing, checkpointing, and clear refusals.
"""

import functools
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastmoe
from benchmarks.problems import EDGE, make_inputs
from fastmoe import autograd, ops, tuning
from fastmoe.backends import launch as launching
from fastmoe.backends.launch import launch
from fastmoe.device import matmul_precision
from tests.kernels.common import DEVICE, DTYPES, Recorder, error, run

SMALL = EDGE[0]


def backward_ops(frozen: set[str]) -> list[str]:
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    leaves = {k: v.requires_grad_(k not in frozen) for k, v in inputs.leaves().items()}
    out = fastmoe.fused_experts(
        inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down
    )
    with Recorder() as recorder:
        out.backward(inputs.grad)
    assert {k for k, v in leaves.items() if v.grad is None} == frozen
    return recorder.names


def test_frozen_experts_compute_no_weight_gradient():
    assert backward_ops({"up", "down"}).count("weight_grad") == 0
    assert backward_ops({"down"}).count("weight_grad") == 1
    assert backward_ops(set()).count("weight_grad") == 2


def test_frozen_inputs_compute_no_input_gradient():
    assert backward_ops(set()).count("grouped_linear") == 1
    assert backward_ops({"x"}).count("grouped_linear") == 0


def test_frozen_experts_do_not_keep_the_input():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    inputs.x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        args = (inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
        fastmoe.fused_experts(inputs.x, *args)
    assert inputs.x.data_ptr() not in {t.data_ptr() for t in saved}


def test_inference_keeps_no_up_projection():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    seen = []
    real = autograd.fused_forward

    class KeepH(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.__name__.startswith("up_gate"):
                seen.append(args[-1])
            return out

    with torch.no_grad(), KeepH():
        fastmoe.fused_experts(
            inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down
        )
    assert seen == [False] and real is autograd.fused_forward


def test_saves_x_h_and_the_routing_only():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    for leaf in inputs.leaves().values():
        leaf.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        fastmoe.fused_experts(
            inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down
        )
    own = {t.data_ptr() for t in (*inputs.leaves().values(), inputs.top_k_index)}
    extra = [t for t in saved if t.is_floating_point() and t.data_ptr() not in own]
    assert [tuple(t.shape) for t in extra] == [(SMALL.T * SMALL.K, 2 * SMALL.I)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    expected = run(fastmoe.fused_experts, SMALL, inputs)

    def checkpointed(x, ids, weights, up, down, **kwargs):
        return checkpoint(
            fastmoe.fused_experts, x, ids, weights, up, down, use_reentrant=reentrant, **kwargs
        )

    if reentrant:  # takes no keyword arguments

        def checkpointed(x, ids, weights, up, down, **kwargs):  # noqa: F811
            return checkpoint(
                lambda *a: fastmoe.fused_experts(*a), x, ids, weights, up, down, use_reentrant=True
            )

        expected_inputs = inputs.leaves()
        for leaf in expected_inputs.values():
            leaf.requires_grad_()
        out = checkpointed(
            inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down
        )
        out.backward(inputs.grad)
        got = {k: v.grad for k, v in expected_inputs.items()} | {"out": out.detach()}
    else:
        got = run(checkpointed, SMALL, inputs)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize(("dtype", "recompute"), [(torch.float32, False), (DTYPES[0], True)])
def test_retained_graph_gives_the_same_gradients_twice(dtype, recompute):
    inputs = make_inputs(SMALL, dtype, DEVICE)
    leaves = [v.requires_grad_() for v in inputs.leaves().values()]
    args = (inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    out = fastmoe.fused_experts(*args, recompute=recompute)
    first = torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, inputs.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("written", [False, True], ids=["fused", "as_written"])
def test_compiles_without_graph_breaks(written):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    gate = (
        (lambda h: torch.nn.functional.silu(h[:, : SMALL.I]) * h[:, SMALL.I :])
        if written
        else fastmoe.Gate()
    )

    def f(x, ids, weights, up, down, **kwargs):
        return fastmoe.fused_experts(x, ids, weights, up, down, gate=gate)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = run(fastmoe.fused_experts, SMALL, inputs)
    got = run(compiled, SMALL, inputs)
    for key in expected:
        assert error(got[key], expected[key].double()) < 1e-5, key


def test_ops_pass_opcheck():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    triton = fastmoe.backend_name(inputs.x) == "triton"
    block_m = tuning.bucket(SMALL.T * SMALL.K, SMALL.E) if triton else 0
    routing = list(ops.route(inputs.top_k_index, SMALL.E, block_m))
    layer = (routing, block_m, SMALL.K)
    gate = fastmoe.Gate().spec()
    h, a = ops.up_gate(inputs.x, inputs.up, None, *layer, gate, False, True)
    y = ops.grouped_linear(a, inputs.down, None, *layer, False, False)
    gate_args = (inputs.grad, inputs.top_k_weights, inputs.down, h, *layer, gate, False)
    grad_h = ops.gate_backward(*gate_args, True, True)[0]
    checks = "test_schema", "test_faketensor"
    for op, args in [
        (ops.up_gate, (inputs.x, inputs.up, None, *layer, gate, False, True)),
        (ops.grouped_linear, (a, inputs.down, None, *layer, False, False)),
        (ops.combine, (y, inputs.top_k_weights, *layer)),
        (ops.combine_backward, (inputs.grad, y, inputs.top_k_weights, *layer)),
        (ops.gate_backward, (*gate_args, True, True)),
        (ops.gate_backward, (*gate_args, False, False)),
        (ops.weight_grad, (grad_h, inputs.x, *layer, True, False)),
        (ops.add_weight_grad, (grad_h, inputs.x, inputs.up.clone(), *layer, True, False)),
        (ops.bias_grad, (grad_h, None, *layer, False, torch.float32)),
    ]:
        torch.library.opcheck(op.registered.default, args, test_utils=checks)


def call(**changes):
    i = make_inputs(SMALL, torch.float32, DEVICE)
    args = dict(
        x=i.x, top_k_index=i.top_k_index, top_k_weights=i.top_k_weights, up=i.up, down=i.down
    )
    for name, change in changes.items():
        args[name] = change(args[name]) if callable(change) and name != "gate" else change
    return fastmoe.fused_experts(**args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=lambda x: x[:, :-1]), r"x must be \(T, 32\)"),
        (dict(x=lambda x: x.long()), "floats"),
        (dict(top_k_index=lambda i: i.float()), "int32 or int64"),
        (dict(top_k_index=lambda i: i[:-1]), r"top_k_index must be \(40, K\)"),
        (dict(top_k_weights=lambda w: w[:, :1]), r"top_k_weights must be \(40, 2\)"),
        (dict(up=lambda w: w[0]), "stacks of matrices"),
        (dict(up=lambda w: w.to(torch.int8)), "quantised"),
        (dict(down=lambda w: w[:-1]), "do not belong together"),
        (dict(down=lambda w: w[..., :-1]), "do not belong together"),
        (dict(down=lambda w: w.half()), "share one dtype"),
        (dict(is_transposed=True), "x must be"),
        (dict(gate=fastmoe.Gate("silu", gated=False)), "ungated"),
        (dict(up_bias=torch.zeros(3, device=DEVICE)), r"up_bias must be \(6, 96\)"),
        (dict(x=lambda x: x.to("meta")), "one device"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v[:24],
)
def test_wrong_input_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k_index=lambda i: i - 6), "negative id"),
        (dict(top_k_index=lambda i: i + 6), "with a routing weight"),
        (dict(top_k_weights=lambda w: w / 0), "not finite"),
        (dict(x=lambda x: x * float("nan")), "not finite"),
    ],
    ids=["negative", "weighted sentinel", "infinite weights", "nan"],
)
def test_checks_that_need_a_sync(monkeypatch, changes, message):
    call(**changes)  # without the switch: defined results, no error
    monkeypatch.setenv("HF_MOE_EP_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "options",
    [
        dict(activation="mish"),
        dict(activation="relu", alpha=2.0),
        dict(limit=-1.0),
        dict(gated=False, limit=1.0),
    ],
    ids=str,
)
def test_gates_that_do_not_exist(options):
    with pytest.raises(ValueError):
        fastmoe.Gate(**options)


def test_second_derivatives_are_refused():
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    x = inputs.x.requires_grad_()
    out = fastmoe.fused_experts(x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    with pytest.raises(ValueError, match="second derivatives"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_captures_into_a_cuda_graph():
    inputs = make_inputs(SMALL, torch.bfloat16, DEVICE)
    args = (inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down)
    with torch.no_grad():
        fastmoe.fused_experts(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fastmoe.fused_experts(*args)
        other = make_inputs(SMALL, torch.bfloat16, DEVICE, seed=1)
        for mine, new in zip(
            args,
            (other.x, other.top_k_index, other.top_k_weights, other.up, other.down),
            strict=True,
        ):
            mine.copy_(new)
        graph.replay()
        assert torch.equal(out, fastmoe.fused_experts(*args))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs 30 GiB of GPU memory")
def test_more_than_two_billion_elements():
    p = replace(SMALL, T=600_000, H=64, I=1024, E=2, K=2)  # h (1.2M, 2048) has 2.4e9 elements
    inputs = make_inputs(p, torch.bfloat16, DEVICE)
    got = run(fastmoe.fused_experts, p, inputs)
    last = slice(p.T - 64, None)  # the tokens whose rows lie past 2^31 elements
    out = fastmoe.reference_experts(
        inputs.x[last].double(), inputs.top_k_index[last], inputs.top_k_weights[last].double(),
        inputs.up.double(), inputs.down.double(),
    )  # fmt: skip
    assert error(got["out"][last], out) < 0.01
    assert all(torch.isfinite(v).all() for v in got.values())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="a thread without a CUDA context needs a GPU")
def test_backward_in_a_thread_without_a_context():
    inputs = make_inputs(SMALL, torch.bfloat16, DEVICE)
    for leaf in inputs.leaves().values():
        leaf.requires_grad_()
    # Compiled already, so that nothing but a descriptor comes first.
    run(fastmoe.fused_experts, SMALL, inputs)
    failures = []

    def work():
        try:
            out = fastmoe.fused_experts(
                inputs.x, inputs.top_k_index, inputs.top_k_weights, inputs.up, inputs.down
            )
            out.backward(inputs.grad)
        except RuntimeError as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


class Kernel:
    """A Triton kernel that notes how it is launched."""

    def __init__(self):
        self.log = []

    def fn(self):
        """What Triton compiles."""

    def __getitem__(self, grid):
        def call(*args, num_warps):
            self.log.append(("looked at", grid, args))
            return Compiled(self.log)

        return call


class Compiled:
    function = packed_metadata = None

    def __init__(self, log):
        self.log = log

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.log.append(("launched", (x, y), args))


def test_a_known_kind_is_launched_directly_unless_an_address_is_odd(hooks):
    kernel, t = Kernel(), torch.zeros(64)
    grid, odd = (2, 3), t[1:]
    assert t.data_ptr() % 16 == 0
    calls = [
        ((t, None), (7,), (1,), "looked at"), ((t, None), (8,), (1,), "launched"),
        ((odd, None), (8,), (1,), "looked at"), ((t, odd), (8,), (1,), "looked at"),
        ((t, None), (2**31,), (1,), "looked at"), ((t, None), (8,), (2,), "looked at"),
        ((t.double(), None), (8,), (1,), "looked at"), ((t, None), (9,), (2,), "launched"),
    ]  # fmt: skip
    for tensors, numbers, constants, _ in calls:
        launch(kernel, grid, tensors, numbers, constants, num_warps=4)
    assert [how for how, *_ in kernel.log] == [how for *_, how in calls]
    assert all(where[:2] == grid for _, where, _ in kernel.log)
    for (how, _, args), (tensors, numbers, constants, _) in zip(kernel.log, calls, strict=True):
        addresses = (None if a is None else a.data_ptr() for a in tensors)
        given = tuple(addresses) if how == "launched" else tensors
        wanted = (*given, *numbers, *constants)
        assert all(a is b or a == b for a, b in zip(args, wanted, strict=True))


def test_a_profiler_of_triton_sees_every_launch_and_an_unknown_triton_makes_them(hooks):
    kernel, t = Kernel(), torch.zeros(64)
    for calls, known in (([], True), ([print], True), ([], False), ([], True)):
        hooks.launch_enter_hook.calls, hooks.known = calls, known
        launch(kernel, (1,), (t,), (), (), num_warps=4)
    for hook in (print, None):  # a plain function in the place of Triton's chain, and nothing
        hooks.launch_exit_hook = hook
        launch(kernel, (1,), (t,), (), (), num_warps=4)
    ways = ["looked at", "looked at", "looked at", "launched", "looked at", "launched"]
    assert [how for how, *_ in kernel.log] == ways


def test_the_installed_triton_is_known():
    pytest.importorskip("triton")
    known, driver, hooks = launching._triton()
    assert known and driver is not None
    assert hooks.launch_enter_hook.calls == hooks.launch_exit_hook.calls == []


def test_tiles_are_described_anew_for_another_address_or_shape(hooks):
    """And what is kept for the next launch keeps no memory alive."""
    kernel, memory = Kernel(), torch.arange(4096.0)
    assert memory.data_ptr() % 16 == 0
    shapes = {(64, 64): memory, (32, 128): memory, (32, 64): memory[2048:]}
    for shape, array in [*shapes.items(), *shapes.items()]:
        tiles = launching.Tiles(array, shape, (16, 32))
        launch(kernel, (1,), (tiles,), (), (), num_warps=4)
    # The block is what Triton compiles for, not the shape.
    assert [how for how, *_ in kernel.log] == ["looked at"] + ["launched"] * 5
    for (how, _, (described,)), (shape, array) in zip(
        kernel.log, [*shapes.items(), *shapes.items()], strict=True
    ):
        assert tuple(described.shape) == shape and described.strides == [shape[1], 1]
        assert described.block_shape == [16, 32]
        assert described.base.data_ptr() == array.data_ptr()
        assert isinstance(described.base, torch.Tensor) == (how == "looked at")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_the_one_that_runs():
    """As under device_map="auto": the current device is another."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        inputs = make_inputs(SMALL, torch.bfloat16, "cpu")
        leaves = [t.to(device).requires_grad_() for t in (inputs.x, inputs.up, inputs.down)]
        ids, weights = inputs.top_k_index.to(device), inputs.top_k_weights.to(device)
        for _ in range(2):  # compiled, then known
            with torch.cuda.device(0):
                out = fastmoe.fused_experts(leaves[0], ids, weights, *leaves[1:])
                grads = torch.autograd.grad(out, leaves, inputs.grad.to(device))
            results.append([t.cpu() for t in (out.detach(), *grads)])
    assert all(a.equal(b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter compiles nothing")
def test_decode_of_other_kinds_and_odd_addresses():
    for dtype in (torch.bfloat16, torch.float32):
        for ids in (torch.int32, torch.int64):
            i = make_inputs(replace(SMALL, T=1), dtype, DEVICE)
            args = (i.top_k_index.to(ids), i.top_k_weights, i.up, i.down)
            odd = torch.cat([i.x.new_zeros(1), i.x.flatten()])[1:].view_as(i.x)
            want = fastmoe.reference_experts(i.x, i.top_k_index, *args[1:])
            with torch.no_grad():
                for x in (i.x, i.x, odd, i.x):
                    assert error(fastmoe.fused_experts(x, *args), want.double()) < 0.01


class ExpertsModule(torch.nn.Module):
    """What transformers makes of an experts class that writes no gate."""

    def __init__(self):
        super().__init__()
        self.act_fn = torch.nn.SiLU()

    def _default_apply_gate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    _apply_gate = _default_apply_gate


def test_the_hub_layer_fuses_no_gate_that_was_changed():
    gate_of = fastmoe.layers._gate_of
    assert gate_of(ExpertsModule()) == fastmoe.Gate("silu")

    hooked = ExpertsModule()
    hooked.act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    assert gate_of(hooked) == hooked._apply_gate

    class Wrapped(ExpertsModule):
        @functools.wraps(ExpertsModule._default_apply_gate)
        def _apply_gate(self, h):
            return 2 * self._default_apply_gate(h)

    wrapped = Wrapped()
    assert gate_of(wrapped) == wrapped._apply_gate


def test_fp32_is_multiplied_as_torch_is_set_to():
    """By either of torch's interfaces; after the newer one, the getter of the older may raise."""
    matmul = torch.backends.cuda.matmul
    x = make_inputs(SMALL, torch.float32, DEVICE)
    operands = (x.x, x.top_k_index, x.top_k_weights, x.up, x.down)
    try:
        for older, name in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(older)
            assert matmul_precision(torch.float32) == name
        for newer in ("tf32", "ieee") if hasattr(matmul, "fp32_precision") else ():
            matmul.fp32_precision = newer
            assert matmul_precision(torch.float32) == newer
            assert matmul_precision(torch.bfloat16) == "ieee"
            with torch.no_grad():
                assert fastmoe.fused_experts(*operands).isfinite().all()
    finally:
        torch.set_float32_matmul_precision("highest")
