"""The weight gradient's Gluon kernel compiled for a Hopper GPU that is not here; nothing is run."""

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.language import NVMMASharedLayout  # noqa: E402

from fastmoe import hopper  # noqa: E402
from fastmoe.backends.gluon.weight_grad import weight_grad_kernel  # noqa: E402

SHARED_MEMORY = 232_448  # bytes one program may have


def descriptor(dtype: str, bits: int, *block: int) -> str:
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{layout!r}>"


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("add", [None, "bf16", "fp32"])
@pytest.mark.parametrize("width", [2048, 2880])  # a multiple of the tile, and not
def test_fits_a_hopper_gpu_and_adds_by_bulk_copies(width, add, transpose):
    bits = 32 if add == "fp32" else 16
    half, columns = hopper._BLOCK_M // 2, hopper._TILE_N * 16 // bits
    block = (1, half, columns) if transpose else (1, columns, half)
    types = dict(
        p_desc=descriptor("bf16", 16, hopper._BLOCK_K, hopper._TILE_N), q_ptr="*bf16",
        out_desc=descriptor(add or "bf16", bits, *block),
        perm_ptr="*i32", offsets_ptr="*i32", next_ptr="*i32", num_experts="i32",
    )  # fmt: skip
    values = dict(
        P=width, Q=width, TOP_K=8, TRANSPOSE=transpose, ADD=add is not None,
        BLOCK_P=hopper._TILE_N, BLOCK_Q=hopper._BLOCK_M, BLOCK_K=hopper._BLOCK_K,
        STAGES=hopper._STAGES,
    )  # fmt: skip
    names = [p.name for p in weight_grad_kernel.params]
    source = GluonASTSource(
        weight_grad_kernel,
        {n: types.get(n, "constexpr") for n in names},
        {n: values[n] for n in names if n in values},
        {(names.index(n),): [["tt.divisibility", 16]] for n in ("q_ptr", "perm_ptr")},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=dict(num_warps=4))
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY
    ptx = compiled.asm["ptx"]
    stores = ptx.count("cp.async.bulk.tensor.3d.global.shared")
    adds = ptx.count("cp.reduce.async.bulk.tensor.3d.global.shared")
    writes = 4 if add == "fp32" else 2  # by each of two warpgroups, halves of an fp32 tile
    assert (stores, adds) == ((0, writes) if add else (writes, 0))
