"""Host side of the warp-specialised Hopper kernels (Gluon): where they serve, and their launches.

Shapes as in `grouped_gemm`, which calls here first and runs its Triton kernels for the rest: other
GPUs, small batches (but for weight gradients), rows that bulk copies cannot read, a Triton that
these have not run with.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .backends.launch import Tiles, launch, ragged
from .device import num_programs
from .gates import Gate
from .routing import Routing

_BLOCK_M, _TILE_N, _BLOCK_K = 128, 256, 64
_STAGES = 3  # beside buffers of 64 KiB for results; smaller ones leave room for another
_GROUP_M = 8  # row tiles that share a column tile's weights in L2
_TRITON = ((3, 6), (3, 7))  # the versions that these have run with


@lru_cache
def available(device: torch.device) -> bool:
    """Whether the device and the Triton here are the ones that these kernels have run with."""
    if (
        device.type != "cuda"
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(device) != (9, 0)
    ):
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in _TRITON


def serves_up_gate(
    x: torch.Tensor, up: torch.Tensor, r: Routing, gate: Gate, transposed: bool
) -> bool:
    """Whether the kernel takes x (T, H), the up weight (E, 2I, H) or (E, H, 2I), and this gate.

    It does if they are 16-bit and aligned, H is a multiple of its step, I of 8, and there are more
    than 64 rows an expert. Not a transposed weight in halves.
    """
    width = up.shape[2] if transposed else up.shape[1]
    return (
        gate.gated
        and (gate.interleaved or not transposed)
        and r.block_m == _BLOCK_M
        and x.dtype in (torch.bfloat16, torch.float16)
        and available(x.device)
        and _aligned(x, up)
        and width % 16 == 0
        and x.shape[1] % _BLOCK_K == 0
    )


def up_gate(
    x: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor,
    a: torch.Tensor, r: Routing, gate: Gate, transposed: bool,
) -> None:  # fmt: skip
    """Writes a (S, I), and h (S, 2I) unless it is empty; see `grouped_gemm.up_gate`."""
    from .backends.gluon.up import up_gate_kernel

    inner, columns = a.shape[1], _TILE_N // 2
    if gate.interleaved:
        w = _tiles(up, (_BLOCK_K, _TILE_N) if transposed else (_TILE_N, _BLOCK_K))
        pieces = (h, h)
    else:
        shape, block = (2 * up.shape[0], inner, up.shape[2]), (2, columns, _BLOCK_K)
        w = Tiles(up, shape, block, _tile_layout(16, 3))
        pieces = (h[:, :inner], h[:, inner:]) if h.numel() else (h, h)
    n_tiles = -(-inner // columns)
    programs = num_programs(x.device)
    a_rows, *h_rows = (
        ragged(t, (_BLOCK_M // 2, columns), _tile_layout(16, 4)) if t.numel() else None
        for t in (a, *pieces)
    )
    launch(
        up_gate_kernel, (programs,),
        (x, w, bias, *h_rows, a_rows, r.perm, r.offsets, r.tiles, r.num_tiles), (),
        (r.num_experts, inner, x.shape[1], r.top_k, gate.interleaved, transposed,
         bias is not None, h.numel() > 0, gate.activation, gate.alpha, gate.limit, gate.up_offset,
         _BLOCK_M, columns, _BLOCK_K, _STAGES + 1, n_tiles, _GROUP_M, programs),
        num_warps=4,
    )  # fmt: skip


def serves_gate_backward(
    grad: torch.Tensor, w: torch.Tensor, h: torch.Tensor, r: Routing, gate: Gate
) -> bool:
    """Whether the kernel takes grad (T, H), the down weight (E, H, I) or (E, I, H), and this gate.

    It does if they are bf16 and aligned, H is a multiple of its step, the expert is gated, and
    there are more than 64 rows an expert. Not fp16: what it keeps between the GEMM and the gate is
    not yet multiplied by the routing weight, and might overflow.
    """
    return (
        gate.gated
        and r.block_m == _BLOCK_M
        and grad.dtype == torch.bfloat16
        and available(grad.device)
        and _aligned(grad, w, h)
        and h.shape[0] > 0
        and h.shape[1] % 16 == 0
        and grad.shape[1] % _BLOCK_K == 0
    )


def gate_backward(
    grad: torch.Tensor, weights: torch.Tensor, down: torch.Tensor, h: torch.Tensor,
    r: Routing, gate: Gate, transposed: bool, keep_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(grad_h (S, 2I), weights * a (S, I) or empty, dots (S, n)).

    See `grouped_gemm.gate_backward`; the gradient of a is rounded to bf16 before the gate's.
    """
    from .backends.gluon.gated import gate_backward_kernel

    rows, inner = h.shape[0], h.shape[1] // 2
    n_tiles = -(-inner // _TILE_N)
    grad_h = torch.empty_like(h)
    a = grad.new_empty((rows, inner) if keep_a else 0)
    dots = grad.new_empty(rows, n_tiles, dtype=torch.float32)
    block = (_TILE_N, _BLOCK_K) if transposed else (_BLOCK_K, _TILE_N)
    programs = num_programs(grad.device)
    launch(
        gate_backward_kernel, (programs,),
        (grad, _tiles(down, block), weights, h, grad_h, a, dots,
         r.perm, r.offsets, r.tiles, r.num_tiles), (),
        (r.num_experts, inner, grad.shape[1], r.top_k, gate.interleaved, not transposed, keep_a,
         gate.activation, gate.alpha, gate.limit, gate.up_offset,
         _BLOCK_M, _TILE_N, _BLOCK_K, _STAGES, n_tiles, _GROUP_M, programs),
        num_warps=4,
    )  # fmt: skip
    return grad_h, a, dots


def serves_linear(rows: torch.Tensor, w: torch.Tensor, r: Routing, transposed: bool) -> bool:
    """Whether the kernel takes rows (S, K), sorted by expert, and w (E, N, K) or (E, K, N).

    It does if they are 16-bit and aligned, there are more than 64 rows an expert, and no step
    reaches past the K rows of a transposed weight.
    """
    whole = rows.shape[1] % _BLOCK_K == 0 if transposed else w.shape[1] % 8 == 0
    return (
        r.block_m == _BLOCK_M
        and rows.dtype in (torch.bfloat16, torch.float16)
        and available(rows.device)
        and _aligned(rows, w)
        and whole
        and rows.shape[0] > 0
    )


def linear(
    rows: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    r: Routing, transposed: bool,
) -> None:  # fmt: skip
    """Writes out (S, N); see `grouped_gemm.grouped_linear`."""
    from .backends.gluon.linear import grouped_linear_kernel

    n_tiles = -(-out.shape[1] // _TILE_N)
    programs = num_programs(rows.device)
    layout = _tile_layout(16, 4)
    block = (_BLOCK_K, _TILE_N) if transposed else (_TILE_N, _BLOCK_K)
    launch(
        grouped_linear_kernel, (programs,),
        (ragged(rows, (_BLOCK_M, _BLOCK_K), layout), _tiles(w, block), bias,
         ragged(out, (_BLOCK_M // 2, _TILE_N), layout), r.offsets, r.tiles, r.num_tiles), (),
        (out.shape[1], rows.shape[1], transposed, bias is not None, _TILE_N, _BLOCK_K, _STAGES,
         n_tiles, _GROUP_M, programs),
        num_warps=4,
    )  # fmt: skip


def serves_weight_grad(p: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether the kernel takes p (S, P) and gathered q (T, Q).

    It does if they are 16-bit and their rows aligned.
    """
    return (
        p.dtype in (torch.bfloat16, torch.float16)
        and available(p.device)
        and _aligned(p, q)
        and p.shape[0] > 0
    )


def weight_grad_stages(itemsize: int) -> int:
    """Stages beside the two halves of a tile of results with elements of this size in bytes."""
    return _STAGES + 1 if itemsize == 2 else _STAGES


def weight_grad(
    p: torch.Tensor, q: torch.Tensor, out: torch.Tensor, r: Routing, transpose_out: bool, add: bool
) -> None:
    """Writes out (E, P, Q) or (E, Q, P), q gathered, or adds to it; see `grouped_gemm.weight_grad`.

    `out` is contiguous, its base a multiple of 16 bytes.
    """
    from .backends.gluon.weight_grad import weight_grad_kernel

    half = _BLOCK_M // 2
    programs = num_programs(p.device)
    out_block = (1, half, _TILE_N // 2) if transpose_out else (1, _TILE_N // 2, half)
    launch(
        weight_grad_kernel, (programs,),
        (ragged(p, (_BLOCK_K, _TILE_N), _tile_layout(16, 4)), q, _tiles(out, out_block),
         r.perm, r.offsets, torch.zeros(1, dtype=torch.int32, device=p.device)), (),
        (r.num_experts, p.shape[1], q.shape[1], r.top_k, transpose_out, add,
         _TILE_N, _BLOCK_M, _BLOCK_K, weight_grad_stages(out.element_size())),
        num_warps=4,
    )  # fmt: skip


def _aligned(*arrays: torch.Tensor) -> bool:
    """Whether the rows of these arrays of 16-bit elements begin at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.shape[-1] % 8 == 0 for t in arrays)


def _tiles(array: torch.Tensor, block: tuple[int, ...]) -> Tiles:
    """An array as it is, or, for a block of two dimensions, as one matrix of rows as its last."""
    width = array.shape[-1]
    shape = (array.numel() // width, width) if len(block) == 2 else tuple(array.shape)
    return Tiles(array, shape, block, _tile_layout(8 * array.element_size(), len(block)))


@lru_cache
def _tile_layout(bits: int, rank: int):
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)
