"""Calls without gradients that are made again by their launches alone.

They give the same bits, and where launches do not tell what to do they are not. Under
TRITON_INTERPRET=1 the kernels are interpreted at the addresses that a launch is given.
"""

import ctypes
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch

import fastmoe
from benchmarks.problems import EDGE, make_inputs
from fastmoe import moe
from fastmoe.backends import replay as replaying
from fastmoe.backends.launch import Tiles, launch, recorded
from fastmoe.backends.replay import replayed
from fastmoe.device import INTERPRETING
from tests.kernels.common import DEVICE, DTYPES, Recorder, gate_of

SMALL = EDGE[0]
BY_NAME = {p.name: p for p in EDGE}


class Interpreted:
    """What Triton would return for a launch if it compiled on a CPU: interprets the kernel again.

    `args` are those of the first launch, for the shapes of what is at the addresses.
    """

    function = packed_metadata = None

    def __init__(self, run, args):
        self.again, self.like = run, args

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.again(*map(self.at, args, self.like), grid=(x, y, z), warmup=False)

    def at(self, given, like):
        if hasattr(like, "base"):
            base = self.at(given.base.data_ptr(), like.base)
            return type(like)(base, given.shape, given.strides, given.block_shape)
        if not isinstance(like, torch.Tensor):
            return given
        if not like.numel():
            return like
        memory = (ctypes.c_char * (like.numel() * like.itemsize)).from_address(given)
        return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


@pytest.fixture
def compiles(hooks, monkeypatch):
    """Triton on this machine, its interpreter in the part of its compiler."""
    if DEVICE == "cuda":
        monkeypatch.undo()
        monkeypatch.setattr(replaying, "_replays", {})
    elif INTERPRETING:
        from triton.runtime.interpreter import InterpretedFunction as Function

        real = Function.run

        def run(self, *args, **options):
            real(self, *args, **options)
            return Interpreted(lambda *a, **k: real(self, *a, **options | k), args)

        monkeypatch.setattr(Function, "run", run)
    else:
        pytest.skip("plain PyTorch launches nothing")


def call(p, dtype, seed):
    """A call without gradients of one seed's operands, and its result by all of the code."""
    i = make_inputs(p, dtype, DEVICE, seed=seed)
    operands = (i.x, i.top_k_index, i.top_k_weights, i.up, i.down)
    options = dict(
        gate=gate_of(p), up_bias=i.up_bias, down_bias=i.down_bias, is_transposed=p.transposed
    )
    with torch.no_grad():
        # A function that gives None is called like any that gives a routing: nothing is replayed.
        want = fastmoe.fused_experts(*operands, routing=lambda: None, **options)
    return lambda: fastmoe.fused_experts(*operands, **options), want


NAMES = [
    "small", "top16", "odd_sizes", "tile_plus_one", "sentinels", "all_sentinels",
    "transposed_odd", "gpt_oss_sentinels", "ungated_silu_bias",
]  # fmt: skip
MANY = [BY_NAME[name] for name in NAMES]
FEW = [replace(p, name=f"{p.name}_few", T=2, E=64) for p in MANY if p.K < 16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", MANY + FEW, ids=lambda p: p.name)
def test_fused_again(p, dtype, compiles, monkeypatch):
    """Other values in other memory give what a call gives that looks at everything."""
    calls = [call(p, dtype, seed) for seed in range(3)]
    with torch.no_grad():
        assert calls[0][0]().equal(calls[0][1])
        monkeypatch.setattr(moe, "_validate", None)
        for again, want in calls:
            assert again().equal(want)
    assert len(replaying._replays) == 1


def test_fused_again_is_looked_at_where_someone_looks(compiles, monkeypatch):
    """Bad input, checked values, gradients and dispatch modes, after calls of that very kind."""
    i = make_inputs(SMALL, DTYPES[0], DEVICE)
    operands = {"x": i.x, "top_k_index": i.top_k_index, "top_k_weights": i.top_k_weights}
    operands |= {"up": i.up, "down": i.down}
    for _ in range(2):
        out = fastmoe.fused_experts(**operands)
    assert len(replaying._replays) == 1

    for name, t in operands.items():
        with pytest.raises(ValueError, match="must be|do not belong"):
            fastmoe.fused_experts(**operands | {name: t[..., :-1].contiguous()})
    with pytest.raises(ValueError, match="int32 or int64"):
        fastmoe.fused_experts(**operands | {"top_k_index": i.top_k_index.float()})

    with Recorder() as seen:
        assert fastmoe.fused_experts(**operands).equal(out)
    assert seen.names == ["route", "up_gate", "grouped_linear", "combine"]

    assert not out.requires_grad
    assert fastmoe.fused_experts(**operands | {"up": i.up.requires_grad_()}).requires_grad
    with torch.no_grad():
        assert not fastmoe.fused_experts(**operands).requires_grad

    monkeypatch.setenv("HF_MOE_EP_CHECK", "1")
    i.top_k_index[0, 0] = -1
    with pytest.raises(ValueError, match="negative id -1"):
        fastmoe.fused_experts(**operands)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="a thread without a CUDA context needs a GPU")
def test_fused_again_in_a_thread_without_a_context(compiles):
    again, want = call(replace(SMALL, H=64, I=64), torch.bfloat16, 0)
    results = []
    with torch.no_grad():
        again()

    def work():
        with torch.no_grad():
            results.append(again())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].equal(want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_fused_again_on_a_device_that_is_not_the_current_one(compiles):
    i = make_inputs(SMALL, torch.bfloat16, "cpu")
    operands = (i.x, i.top_k_index, i.top_k_weights, i.up, i.down)
    results = []
    with torch.no_grad(), torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            there = [t.to(device) for t in operands]
            results += [fastmoe.fused_experts(*there).cpu() for _ in range(3)]
    assert len(replaying._replays) == 2 and all(r.equal(results[0]) for r in results)


class Kernel:
    """A Triton kernel; Triton's compiled one, which notes what it is given, is itself."""

    function = packed_metadata = None

    def __init__(self):
        self.log = []

    def fn(self):
        """What Triton compiles."""

    def __getitem__(self, grid):
        return lambda *args, **options: self

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.log.append(((x, y, z), args))


class Layer:
    """A function that launches twice: over its operands, and over what came of them."""

    def __init__(self, odd=0, part=0):
        self.kernel, self.calls, self.odd, self.part = Kernel(), [], odd, part

    def __call__(self, x, w, bias, width):
        rows, numbers = torch.empty(64, width), torch.empty(24 + self.odd).int()[self.odd :]
        nothing, out = x.new_empty(0), torch.empty_like(x)
        launch(self.kernel, (2, 3), (x, w[self.part :], bias, nothing, rows, numbers[8:]), (7,), ())
        tiles = Tiles(rows, (32, 2 * width), (16, 16))
        launch(self.kernel, (5,), (out, tiles, rows, numbers), (), (width,))
        self.calls.append([weakref.ref(t) for t in (x, w, rows, numbers, out)])
        return out

    def times(self, *operands, n=3):
        """How many of n calls ran the function."""
        before = len(self.calls)
        for _ in range(n):
            replayed(self, operands, (16,))
        return len(self.calls) - before


def test_a_launch_again_has_the_addresses_of_its_own_call(hooks):
    layer, x, w, bias = Layer(), *torch.zeros(3, 4, 16).unbind()
    assert layer.times(x, w, bias, n=1) == 1
    memory = [*layer.calls[0][2:]]
    gc.collect()
    assert all(t() is None for t in memory)  # no array of the first call is kept

    x, w = torch.ones(2, 4, 16).unbind()
    for given in (bias, w.new_zeros(4, 16)):
        layer.kernel.log.clear()
        out = replayed(layer, (x, w, given), (16,))
        (grid, first), (other_grid, second) = layer.kernel.log
        assert (grid, other_grid) == ((2, 3, 1), (5, 1, 1)) and out.shape == x.shape
        assert first[:4] == (x.data_ptr(), w.data_ptr(), given.data_ptr(), 0) and first[6:] == (7,)
        rows, part = first[4:6]
        described, again, numbers, width = second[1:]
        assert second[0] == out.data_ptr() and again == rows and width == 16
        assert part == numbers + 8 * 4 and numbers % 16 == rows % 16 == 0
        assert numbers >= rows + 64 * 16 * 4 or rows >= numbers + 3 * 8 * 4
        assert described.base.data_ptr() == rows and tuple(described.shape) == (32, 32)
    assert len(layer.calls) == 1


def test_kinds_are_dtypes_shapes_missing_operands_and_options(hooks):
    layer, x, w = Layer(), *torch.zeros(2, 4, 16).unbind()
    assert layer.times(x, w, None) == 1
    for others in ((x, w, x + 1), (x.double(), w, None), (x[:2], w, None), (x, w[:2], None)):
        assert layer.times(*others) == 1
    replayed(layer, (x, w, None), (32,))
    assert len(layer.calls) == 6 and layer.times(x, w, None) == 0


def test_what_launches_alone_do_not_tell_runs_again(hooks):
    x, w, empty = *torch.zeros(2, 4, 16).unbind(), torch.zeros(0, 16)
    odd = torch.zeros(65)[1:].view(4, 16)
    assert Layer().times(x, x, None) == 3  # which of the two a kernel takes
    assert Layer().times(x, empty, None) == 3
    assert Layer().times(x, w, odd) == 3  # Triton looks at odd addresses
    assert Layer(odd=1).times(x, w, None) == 3
    assert Layer(part=1).times(x, w, None) == 3  # a part of an operand is not a temporary

    def fills(x):
        out = torch.empty_like(x)
        launch(Kernel(), (1,), (out,), (), ())
        return out

    assert not replaying._replays
    replayed(fills, (x,), ())
    assert not replaying._replays

    layer = Layer()
    assert layer.times(x, w, x + 1) == 1 and layer.times(x, w, odd) == 3
    hooks.launch_enter_hook = print  # a profiler's
    assert layer.times(x, w, x + 1) == 3
    hooks.launch_enter_hook = None
    assert layer.times(x, w, x + 1) == 0


def test_a_record_within_a_record_ends_alone(hooks):
    x, out = torch.zeros(2, 4, 16).unbind()
    with recorded() as outer:
        launch(Kernel(), (1,), (x, out), (), ())
        with recorded() as inner:
            launch(Kernel(), (2,), (x, out), (), ())
        launch(Kernel(), (3,), (x, out), (), ())
    assert [made.grid for made in inner] == [(2,)]
    assert [made.grid for made in outer] == [(1,), (3,)]


def test_transforms_that_have_no_memory_take_the_whole_code():
    i = make_inputs(SMALL, torch.float64, "cpu")
    rest = (i.top_k_index, i.top_k_weights, i.up, i.down)
    with torch.no_grad():
        want = fastmoe.fused_experts(i.x, *rest)
        _, change = torch.func.jvp(lambda x: fastmoe.fused_experts(x, *rest), (i.x,), (i.x,))
        batch = torch.vmap(lambda x: fastmoe.fused_experts(x, *rest))(i.x[None])
    assert batch[0].allclose(want) and change.isfinite().all()


def test_kinds_are_kept_up_to_a_number(hooks, monkeypatch):
    monkeypatch.setattr(replaying, "_MOST", 4)
    layer = Layer()
    for tokens in range(1, 10):
        x, w = torch.zeros(2, 16 * tokens).view(2, tokens, 16).unbind()
        assert layer.times(x, w, None) == 1
        assert len(replaying._replays) <= 4
