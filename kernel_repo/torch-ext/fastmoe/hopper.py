"""Host side of the warp-specialised Hopper kernels (Gluon): where they serve, and their launches.

Shapes as in `grouped_gemm`, which calls here for tiles of 128 rows of 16-bit values and falls back to its Triton kernels
for the rest: other GPUs, small batches, sizes that do not fit the tiles, Triton without Gluon's Hopper interface.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .device import num_programs
from .gates import Gate
from .routing import Routing

_BLOCK_M, _TILE_N, _BLOCK_K, _STAGES = 128, 256, 64, 4
_WEIGHT_GRAD_STAGES = 3  # its store buffers leave room for three
_GROUP_M = 8
_TRITON = ((3, 6), (3, 8))  # first version with the interface, first one not tried


@lru_cache
def _available(device: torch.device) -> bool:
    if (
        device.type != "cuda"
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(device) != (9, 0)
    ):
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return _TRITON[0] <= version < _TRITON[1]


def serves(x: torch.Tensor, w: torch.Tensor, r: Routing) -> bool:
    """Whether rows of x (., K) can be gathered against the contiguous weight w (E, ., .): aligned, K a multiple of 64."""
    if (
        x.dtype not in (torch.bfloat16, torch.float16)
        or r.block_m != _BLOCK_M
        or not _available(x.device)
    ):
        return False
    aligned = (
        all(t.data_ptr() % 16 == 0 for t in (x, w)) and w.shape[1] % 8 == 0 and w.shape[2] % 8 == 0
    )
    return aligned and x.shape[1] % _BLOCK_K == 0 and x.shape[0] > 0


def serves_weight_grad(p: torch.Tensor, q: torch.Tensor, r: Routing) -> bool:
    """The same for the weight gradient of p (S, P) and gathered q (T, Q): P and Q multiples of its tile."""
    if (
        p.dtype not in (torch.bfloat16, torch.float16)
        or r.block_m != _BLOCK_M
        or not _available(p.device)
    ):
        return False
    aligned = all(t.data_ptr() % 16 == 0 for t in (p, q))
    return aligned and p.shape[0] > 0 and p.shape[1] % _BLOCK_M == 0 and q.shape[1] % _TILE_N == 0


def up_gate(x, up, bias, r: Routing, gate: Gate, transposed: bool, keep_h: bool, inner: int):
    """(h (S, U), a (S, inner)); see `grouped_gemm.up_gate`."""
    from .backends.gluon.gated import up_gate_kernel

    rows, depth = r.perm.numel(), x.shape[1]
    h = x.new_empty((rows, up.shape[2] if transposed else up.shape[1]) if keep_h else 0)
    a = x.new_empty(rows, inner)
    paired = gate.gated and not gate.interleaved
    columns = _TILE_N // 2 if gate.gated else _TILE_N
    block = (_BLOCK_K, _TILE_N) if transposed else (columns if paired else _TILE_N, _BLOCK_K)
    programs, n_tiles = num_programs(x.device), -(-inner // columns)
    up_gate_kernel[(programs,)](
        x, _descriptor(up.view(-1, up.shape[2]), block), bias, h, a, r.perm, r.offsets, r.tiles, r.num_tiles,
        inner, depth, r.top_k, gate.gated, gate.interleaved, gate.activation, gate.alpha, gate.limit, gate.up_offset,
        transposed, bias is not None, keep_h, _TILE_N, _BLOCK_K, n_tiles, _GROUP_M, _STAGES, programs, num_warps=4,
    )  # fmt: skip
    return h, a


def gate_backward(
    grad, weights, down, h, r: Routing, gate: Gate, transposed: bool, keep_a: bool, inner: int
):
    """(grad_h, weights * a, dots); see `grouped_gemm.gate_backward`. `transposed`: down is (E, H, I) as this GEMM sees it."""
    from .backends.gluon.gated import gate_backward_kernel

    rows, depth, n_tiles = r.perm.numel(), grad.shape[1], -(-inner // _TILE_N)
    grad_h = torch.empty_like(h)
    a = grad.new_empty((rows, inner) if keep_a else 0)
    dots = grad.new_empty(rows, n_tiles, dtype=torch.float32)
    block = (_BLOCK_K, _TILE_N) if transposed else (_TILE_N, _BLOCK_K)
    programs = num_programs(grad.device)
    gate_backward_kernel[(programs,)](
        grad, _descriptor(down.view(-1, down.shape[2]), block), weights, h, grad_h, a, dots,
        r.perm, r.offsets, r.tiles, r.num_tiles, rows,
        inner, depth, r.num_experts, r.top_k, gate.gated, gate.interleaved, gate.activation, gate.alpha, gate.limit,
        gate.up_offset, transposed, keep_a, _TILE_N, _BLOCK_K, n_tiles, _GROUP_M, _STAGES, programs, num_warps=4,
    )  # fmt: skip
    return grad_h, a, dots


def weight_grad(p: torch.Tensor, q: torch.Tensor, r: Routing, transpose_out: bool) -> torch.Tensor:
    """(E, P, Q) or (E, Q, P) with q gathered; see `grouped_gemm.weight_grad`."""
    from .backends.gluon.weight_grad import weight_grad_kernel

    columns_p, columns_q = p.shape[1], q.shape[1]
    shape = (columns_q, columns_p) if transpose_out else (columns_p, columns_q)
    out = p.new_empty(r.num_experts, *shape)
    half = _BLOCK_M // 2
    out_block = (_TILE_N, half) if transpose_out else (half, _TILE_N)
    programs = num_programs(p.device)
    weight_grad_kernel[(programs,)](
        _descriptor(p, (_BLOCK_K, _BLOCK_M)), q, _descriptor(out.view(-1, out.shape[2]), out_block),
        r.perm, r.offsets, r.num_experts, columns_p, columns_q, r.top_k, transpose_out,
        _BLOCK_M, _TILE_N, _BLOCK_K, _WEIGHT_GRAD_STAGES, programs, num_warps=4,
    )  # fmt: skip
    return out


def _descriptor(matrix: torch.Tensor, block: tuple[int, int]):
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block), layout)
