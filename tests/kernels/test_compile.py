"""The GEMM kernels compiled for GPUs that are not here: what fits an A100 and a Hopper chip.

Triton brings its own assembler, so this needs no GPU; nothing is run.
"""

import json
from importlib.resources import files

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastmoe import decode  # noqa: E402
from fastmoe.backends.triton import routing  # noqa: E402
from fastmoe.backends.triton.decode import decode_down_kernel, decode_up_kernel  # noqa: E402
from fastmoe.backends.triton.exchange import pull_rows_kernel, pull_sums_kernel  # noqa: E402
from fastmoe.backends.triton.gated import gate_backward_kernel, up_gate_kernel  # noqa: E402
from fastmoe.backends.triton.gemm import grouped_linear_kernel  # noqa: E402
from fastmoe.backends.triton.weight_grad import weight_grad_kernel  # noqa: E402
from fastmoe.tuning import GemmConfig  # noqa: E402

SHARED_MEMORY = {
    80: 166_912,
    90: 232_448,
    120: 101_376,
}  # bytes one program may have, by compute capability
H, I, E, K = 2048, 768, 128, 8
GATE = dict(GATED=True, INTERLEAVED=False, ACT="silu", ALPHA=1.0, LIMIT=float("inf"), OFFSET=0.0)


def arguments(kernel: str, c: GemmConfig, tma: bool) -> dict:
    """Types of the arguments and values of the constants for Qwen3-30B-A3B's experts."""

    def tile(*shape):
        return f"tensordesc<bf16[{', '.join(map(str, shape))}]>" if tma else "*bf16"

    def ragged(columns):
        return tile(1, 1, c.block_m, columns)

    pieces = c.pieces(2)
    common = dict(
        perm_ptr="*i32", offsets_ptr="*i32", tiles_ptr="*i32", num_tiles_ptr="*i32",
        NUM_EXPERTS="i32", TOP_K=K, HAS_BIAS=False, bias_ptr=None, PRECISION="ieee",
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP_M=c.group_m,
        NUM_PROGRAMS=132 * c.ctas,
        FLATTEN=c.flatten, TMA_W=tma, TMA_OUT=tma, h_ptr="*bf16", a_ptr="*bf16", I=I,
    )  # fmt: skip
    return common | {
        "up_gate": dict(
            x_ptr="*bf16", w=tile(2, c.block_n, c.block_k), K=H, TRANSPOSED=False, STORE_H=True,
            h=ragged(c.block_n), h_up=ragged(c.block_n), a=ragged(c.block_n),
            N_TILES=-(-I // c.block_n), **GATE,
        ),
        "linear": dict(
            x=ragged(c.block_k), out=ragged(c.block_n // pieces), PIECES=pieces,
            w=tile(c.block_n, c.block_k), N=H, K=I, GATHER=False, TRANSPOSED=False, TMA_X=tma,
            N_TILES=H // c.block_n,
        ),
        "gate_backward": dict(
            grad_ptr="*bf16", w=tile(c.block_k, c.block_n), weights_ptr="*bf16", K=H,
            grad_h_ptr="*bf16", dots_ptr="*fp32", TRANSPOSED=True, STORE_A=True,
            N_TILES=-(-I // c.block_n), **GATE,
        ),
        "weight_grad": dict(
            p=tile(1, 1, c.block_k, c.block_m), q_ptr="*bf16", out_ptr="*bf16", P=2 * I, Q=H,
            GATHER=True, stride_p="i32", stride_q=1, ACCUMULATE=False, TMA_P=tma,
        ),
    }[kernel.removeprefix("add_")] | (
        dict(ACCUMULATE=True, out_ptr="*fp32") if kernel == "add_weight_grad" else {}
    )  # fmt: skip


KERNELS = dict(
    up_gate=up_gate_kernel,
    linear=grouped_linear_kernel,
    gate_backward=gate_backward_kernel,
    weight_grad=weight_grad_kernel,
    add_weight_grad=weight_grad_kernel,
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "capability"), [("a100", 80), ("h200", 90), ("h200", 120)])
@pytest.mark.parametrize("rows", ["128", "16"])
def test_shipped_configs_compile_and_fit(kernel, name, capability, rows):
    table = json.loads((files("fastmoe") / "configs" / f"{name}.json").read_text())["buckets"]
    c = GemmConfig(**table[rows][kernel.removeprefix("add_")])
    limit = SHARED_MEMORY[capability]
    wide = kernel == "up_gate"
    staged = c.staged(kernel, 2, wide) if capability >= 90 else 0
    c = c.fitted(2, c.block_n * (2 if wide else 1), staged, limit)
    function = KERNELS[kernel]
    values = arguments(kernel, c, tma=capability >= 90)
    types = ("*", "tensordesc", "i32")
    signature = {
        p.name: v if isinstance(v := values[p.name], str) and v.startswith(types) else "constexpr"
        for p in function.params
    }
    constants = {n: values[n] for n, kind in signature.items() if kind == "constexpr"}
    pointers = [i for i, p in enumerate(function.params) if signature[p.name].startswith("*")]
    source = ASTSource(
        function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=c.num_warps, num_stages=c.num_stages),
    )
    assert 0 < compiled.metadata.shared <= limit
    ptx = compiled.asm["ptx"]
    assert ("wgmma" in ptx) == (capability == 90 and c.block_m >= 64)
    assert ("cp.async.bulk" in ptx) == (capability >= 90)


def compiled_for(
    capability: int, kernel, types: dict[str, str], values: dict, aligned: tuple[str, ...] = ()
):
    """Arguments named in `types`, constants in `values`; `aligned` are multiples of 16."""
    names = [p.name for p in kernel.params]
    return triton.compile(
        ASTSource(
            kernel,
            {n: types.get(n, "constexpr") for n in names},
            {n: values[n] for n in names if n in values},
            {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
    )


@pytest.mark.parametrize("experts", [8, 128, 384])
@pytest.mark.parametrize("counted", [False, True])
def test_the_routing_compiles(counted, experts):
    """The interpreter does not see types that a compiled loop cannot carry."""
    block_e = max(16, triton.next_power_of_2(experts))
    names = ("counts_ptr", "perm_ptr", "inv_perm_ptr", "offsets_ptr", "tiles_ptr", "num_tiles_ptr")
    types = dict.fromkeys(names, "*i32") | dict(ids_ptr="*i64")
    types |= dict.fromkeys(("S", "per", "num_chunks", "MAX_TILES", "NUM_EXPERTS"), "i32")
    values = dict(CHUNK=512, BLOCK_E=block_e, BLOCK_M=128, STEP=128, COUNTED=counted)
    values |= dict(ROWS=max(routing._COUNTS // block_e, 1))
    if counted:
        counting = {n: types[n] for n in ("ids_ptr", "counts_ptr", "S", "per", "NUM_EXPERTS")}
        assert compiled_for(90, routing.count_kernel, counting, values)
    else:
        del types["counts_ptr"]
        values |= dict(counts_ptr=None)
    assert compiled_for(90, routing.place_kernel, types, values)


@pytest.mark.parametrize("kernel", [pull_rows_kernel, pull_sums_kernel], ids=lambda k: k.__name__)
def test_rows_of_peers_are_read_16_bytes_at_a_time(kernel):
    """Their addresses are integers, of whose alignment the compiler knows what the kernel says."""
    types = dict(
        peers_ptr="*i64", ids_ptr="*i64", out_ptr="*bf16", small_ptr="*fp32",
        T="i32", H="i32", SMALL="i32", NUM_EXPERTS="i32", FIRST_ROW="i32",
        first="i32", second="i32",
    )  # fmt: skip
    values = dict(TOP_K=8, BLOCK_K=8, BLOCK_H=2048, NUM_RANKS=2, BLOCK_SMALL=8)
    aligned = ("peers_ptr", "ids_ptr", "out_ptr", "small_ptr", "H")
    ptx = compiled_for(90, kernel, types, values, aligned).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "ld.global.b16" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_decode_waits_for_the_kernel_before_where_it_starts_early(capability):
    early = capability >= 90
    gate = dict(GATED=True, INTERLEAVED=False, ACT="silu", ALPHA=1.0, LIMIT=float("inf"))
    values = gate | dict(
        OFFSET=0.0, H=H, I=I, TOP_K=K, TRANSPOSED=False, HAS_BIAS=False, bias_ptr=None,
        BLOCK_N=4, BLOCK_K=1024, UNROLL=2, EARLY=early,
    )  # fmt: skip
    names = ("x_ptr", "up_ptr", "a_ptr", "weights_ptr", "down_ptr", "out_ptr")
    types = dict.fromkeys(names, "*bf16") | dict(ids_ptr="*i64", NUM_EXPERTS="i32")
    for kernel in (decode_up_kernel, decode_down_kernel):
        ptx = compiled_for(capability, kernel, types, values).asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == early
        assert not early or ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


def test_decode_of_wide_transposed_weights_compiles_in_seconds():
    """With every load unrolled, as they once were, ptxas took a minute for a kernel of gpt-oss."""
    values = dict(GATED=True, INTERLEAVED=True, ACT="silu", ALPHA=1.702, LIMIT=7.0, OFFSET=1.0)
    values |= dict(H=2880, I=2880, TOP_K=4, TRANSPOSED=True, HAS_BIAS=True, EARLY=True)
    names = ("x_ptr", "up_ptr", "bias_ptr", "a_ptr", "weights_ptr", "down_ptr", "out_ptr")
    types = dict.fromkeys(names, "*bf16") | dict(ids_ptr="*i64", NUM_EXPERTS="i32")
    blocks = (decode._UP_BLOCK, decode_up_kernel), (decode._DOWN_BLOCK, decode_down_kernel)
    for block, kernel in blocks:
        n, k, _, steps = block[True]
        block = dict(BLOCK_N=n, BLOCK_K=k, UNROLL=steps)
        aligned = tuple(names)
        ptx = compiled_for(90, kernel, types, values | block, aligned).asm["ptx"]
        assert 0 < ptx.count("ld.global") < 200
