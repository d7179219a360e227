"""The Gluon kernels compiled for a Hopper GPU that is not here; nothing is run."""

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.language import NVMMASharedLayout  # noqa: E402

from fastmoe import hopper  # noqa: E402
from fastmoe.backends.gluon.gated import gate_backward_kernel  # noqa: E402
from fastmoe.backends.gluon.linear import grouped_linear_kernel  # noqa: E402
from fastmoe.backends.gluon.up import up_gate_kernel  # noqa: E402
from fastmoe.backends.gluon.weight_grad import weight_grad_kernel  # noqa: E402

SHARED_MEMORY = 232_448  # bytes one program may have


def descriptor(dtype: str, bits: int, *block: int) -> str:
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{layout!r}>"


def ptx_of(kernel, types: dict[str, str], values: dict) -> str:
    """The assembly of a kernel with arguments of these types and constants of these values."""
    names = [p.name for p in kernel.params]
    source = GluonASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        {n: values[n] for n in names if n in values},
        {(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n].startswith("*")},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=dict(num_warps=4))
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY
    return compiled.asm["ptx"]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("add", [None, "bf16", "fp32"])
@pytest.mark.parametrize("width", [2048, 2880])  # a multiple of the tile, and not
def test_weight_grad_fits_and_adds_by_bulk_copies(width, add, transpose):
    half, columns = hopper._BLOCK_M // 2, hopper._TILE_N // 2
    block = (1, half, columns) if transpose else (1, columns, half)
    types = dict(
        p_desc=descriptor("bf16", 16, 1, 1, hopper._BLOCK_K, hopper._TILE_N), q_ptr="*bf16",
        out_desc=descriptor(add or "bf16", 32 if add == "fp32" else 16, *block),
        perm_ptr="*i32", offsets_ptr="*i32", next_ptr="*i32", num_experts="i32",
    )  # fmt: skip
    values = dict(
        P=width, Q=width, TOP_K=8, TRANSPOSE=transpose, ADD=add is not None,
        BLOCK_P=hopper._TILE_N, BLOCK_Q=hopper._BLOCK_M, BLOCK_K=hopper._BLOCK_K,
        STAGES=hopper.weight_grad_stages(4 if add == "fp32" else 2),
    )  # fmt: skip
    ptx = ptx_of(weight_grad_kernel, types, values)
    stores = ptx.count("cp.async.bulk.tensor.3d.global.shared")
    adds = ptx.count("cp.reduce.async.bulk.tensor.3d.global.shared")
    assert (stores, adds) == ((0, 4) if add else (4, 0))  # two warpgroups, halves of a tile


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [2048, 2880])
def test_linear_fits_and_writes_by_bulk_copies(width, transposed, bias):
    tile, step = hopper._TILE_N, hopper._BLOCK_K
    types = dict(
        x_desc=descriptor("bf16", 16, 1, 1, hopper._BLOCK_M, step),
        w_desc=descriptor("bf16", 16, *((step, tile) if transposed else (tile, step))),
        out_desc=descriptor("bf16", 16, 1, 1, hopper._BLOCK_M // 2, tile),
        offsets_ptr="*i32", tiles_ptr="*i32", num_tiles_ptr="*i32",
    )  # fmt: skip
    values = dict(
        N=width, K=1536, TRANSPOSED=transposed, HAS_BIAS=bias, BLOCK_N=tile, BLOCK_K=step,
        STAGES=hopper._STAGES, N_TILES=-(-width // tile), GROUP_M=8, PROGRAMS=132,
    )  # fmt: skip
    if bias:
        types["bias_ptr"] = "*bf16"
    ptx = ptx_of(grouped_linear_kernel, types, values | ({} if bias else dict(bias_ptr=None)))
    assert ptx.count("cp.async.bulk.tensor.4d.global.shared") == 2  # one of each warpgroup


SWIGLU = dict(ACT="silu", ALPHA=1.0, LIMIT=float("inf"), OFFSET=0.0)
GPT_OSS = dict(ACT="silu", ALPHA=1.702, LIMIT=7.0, OFFSET=1.0)
GEGLU = dict(ACT="gelu", ALPHA=1.0, LIMIT=float("inf"), OFFSET=0.0)


@pytest.mark.parametrize("keep_h", [False, True])
@pytest.mark.parametrize(
    "gate, interleaved, transposed, bias",
    [
        (SWIGLU, False, False, False), (GEGLU, False, False, True),
        (GPT_OSS, True, True, True), (SWIGLU, True, False, False),
    ],
)  # fmt: skip
def test_up_fits_and_writes_by_bulk_copies(gate, interleaved, transposed, bias, keep_h):
    tile, step = hopper._TILE_N, hopper._BLOCK_K
    rows = descriptor("bf16", 16, 1, 1, hopper._BLOCK_M // 2, tile // 2)
    if interleaved:
        w = descriptor("bf16", 16, *((step, tile) if transposed else (tile, step)))
    else:
        w = descriptor("bf16", 16, 2, tile // 2, step)
    types = dict(x_ptr="*bf16", w_desc=w, a_desc=rows, num_experts="i32")
    types |= dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
    types |= dict.fromkeys(("h_desc", "h_up_desc") if keep_h else (), rows)
    types |= dict(bias_ptr="*bf16") if bias else {}
    values = gate | dict(
        I=2880, K=2880, TOP_K=4, INTERLEAVED=interleaved, TRANSPOSED=transposed, HAS_BIAS=bias,
        STORE_H=keep_h, BLOCK_M=hopper._BLOCK_M, BLOCK_N=tile // 2, BLOCK_K=step,
        STAGES=hopper._STAGES + 1, N_TILES=23, GROUP_M=8, PROGRAMS=132,
    )  # fmt: skip
    nothing = {n: None for n in ("bias_ptr", "h_desc", "h_up_desc") if n not in types}
    ptx = ptx_of(up_gate_kernel, types, values | nothing)
    pieces = 3 if keep_h else 1
    assert ptx.count("cp.async.bulk.tensor.4d.global.shared") == 2 * pieces  # of two warpgroups


@pytest.mark.parametrize(
    "gate, interleaved", [(SWIGLU, False), (GEGLU | dict(LIMIT=7.0), False), (GPT_OSS, True)]
)
def test_gate_backward_fits(gate, interleaved):
    tile, step = hopper._TILE_N, hopper._BLOCK_K
    pointers = ("grad_ptr", "weights_ptr", "h_ptr", "grad_h_ptr", "a_ptr")
    types = dict.fromkeys(pointers, "*bf16") | dict(
        w_desc=descriptor("bf16", 16, step, tile), dots_ptr="*fp32", perm_ptr="*i32",
        offsets_ptr="*i32", tiles_ptr="*i32", num_tiles_ptr="*i32", num_experts="i32",
    )  # fmt: skip
    values = gate | dict(
        N=768, K=2048, TOP_K=8, INTERLEAVED=interleaved, TRANSPOSED=True, KEEP_A=True,
        BLOCK_M=hopper._BLOCK_M, BLOCK_N=tile, BLOCK_K=step, STAGES=hopper._STAGES,
        N_TILES=3, GROUP_M=8, PROGRAMS=132,
    )  # fmt: skip
    assert "wgmma" in ptx_of(gate_backward_kernel, types, values)
