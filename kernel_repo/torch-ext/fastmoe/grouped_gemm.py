"""The GEMMs of an experts layer and their gradients: allocate, choose backend and config, launch.

Shapes: T tokens, S = T*K rows sorted by expert, x and grad (T, H), up (E, U, H) with U = 2I gated
or I, down (E, H, I); `transposed` weights are (E, H, U) and (E, I, H). Rows at or past offsets[-1]
are neither read nor meant to be.
"""

from __future__ import annotations

import torch

from . import hopper, tuning
from .backends import torch_ops
from .backends.launch import Tiles, launch, ragged
from .device import backend_name, has_tma, matmul_precision, num_programs
from .gates import Gate
from .routing import Routing

_TMA_ALIGNMENT = 16  # bytes, of base and row stride


def up_gate(
    x: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    r: Routing,
    gate: Gate,
    transposed: bool,
    keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h (S, U), a (S, I)): h = x[token] @ up[e] + bias and a = gate(h).

    h is empty (0,) unless `keep_h`.
    """
    if backend_name(x) == "torch":
        return torch_ops.up_gate(x, up, bias, r, gate, transposed, keep_h)
    rows, (width, depth) = r.perm.numel(), _out_in(up, transposed)
    inner = width // 2 if gate.gated else width
    h = x.new_empty((rows, width) if keep_h else 0)
    a = x.new_empty(rows, inner)
    if not rows:
        return h, a
    if hopper.serves_up_gate(x, up, r, gate, transposed):
        hopper.up_gate(x, up, bias, h, a, r, gate, transposed)
        return h, a
    from .backends.triton.gated import up_gate_kernel

    c = tuning.gemm_config("up_gate", x.device, x.dtype, r.block_m, wide=gate.gated)
    if gate.gated and not gate.interleaved:
        w, tma = _gate_up_operand(up, transposed, c.block_n, c.block_k)
    else:
        w, tma = _weight_operand(up, transposed, c.block_n * (width // inner), c.block_k)
    n_tiles = -(-inner // c.block_n)
    h_rows, h_up, a_rows, out_tma = h, None, a, _tma_serves(a)
    if out_tma:
        a_rows = ragged(a, (c.block_m, c.block_n))
    if out_tma and keep_h:
        block = (c.block_m, c.block_n * (width // inner) // 2)
        if gate.gated and not gate.interleaved:
            h_rows, h_up = ragged(h[:, :inner], block), ragged(h[:, inner:], block)
        else:
            h_rows = ragged(h, block)
    launch(
        up_gate_kernel, _grid(c, x),
        (x, w, bias, h_rows, h_up, a_rows, r.perm, r.offsets, r.tiles, r.num_tiles), (),
        (inner, depth, r.top_k, gate.gated, gate.interleaved,
         gate.activation, gate.alpha, gate.limit, gate.up_offset,
         transposed, bias is not None, keep_h, tma, out_tma, *_tiling(c, x, n_tiles)),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return h, a


def grouped_linear(
    rows: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    r: Routing,
    transposed: bool,
    gather: bool,
) -> torch.Tensor:
    """(S, N): every row (S, K) times its expert's weight (E, N, K).

    `gather` takes the row's token from (T, K) first.
    """
    if backend_name(rows) == "torch":
        return torch_ops.grouped_linear(rows, w, bias, r, transposed, gather)
    num_rows, (width, depth) = r.perm.numel(), _out_in(w, transposed)
    out = rows.new_empty(num_rows, width)
    if not num_rows:
        return out
    if not gather and hopper.serves_linear(rows, w, r, transposed):
        hopper.linear(rows, w, bias, out, r, transposed)
        return out
    from .backends.triton.gemm import grouped_linear_kernel

    c = tuning.gemm_config("linear", rows.device, rows.dtype, r.block_m)
    n_tiles = -(-width // c.block_n)
    operand, tma = _weight_operand(w, transposed, c.block_n, c.block_k)
    x_tma, out_tma = not gather and _tma_serves(rows), _tma_serves(out)
    pieces = c.pieces(out.element_size())
    launch(
        grouped_linear_kernel, _grid(c, rows),
        (ragged(rows, (c.block_m, c.block_k)) if x_tma else rows, operand, bias,
         ragged(out, (c.block_m, c.block_n // pieces)) if out_tma else out,
         r.perm, r.offsets, r.tiles, r.num_tiles), (),
        (width, depth, r.top_k, gather, transposed, bias is not None, x_tma, tma,
         out_tma, pieces, *_tiling(c, rows, n_tiles)),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def gate_backward(
    grad: torch.Tensor, weights: torch.Tensor, down: torch.Tensor, h: torch.Tensor,
    r: Routing, gate: Gate, transposed: bool, keep_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(grad_h (S, U), weights * a (S, I), dots (S, n) fp32) from grad (T, H).

    grad is the gradient of the layer's output. The sum of the columns of dots is
    <grad[token], down[e] a>, the routing weight's gradient but for the down bias: it costs no read
    of y, which is therefore not saved (SonicMoE, arXiv 2512.14080). a is recomputed from h;
    weights * a is what the down weight's gradient needs, and empty (0,) unless `keep_a`.
    """
    if backend_name(grad) == "torch":
        return torch_ops.gate_backward(grad, weights, down, h, r, gate, transposed, keep_a)
    if hopper.serves_gate_backward(grad, down, h, r, gate):
        return hopper.gate_backward(grad, weights, down, h, r, gate, transposed, keep_a)
    rows, (depth, inner) = r.perm.numel(), _out_in(down, transposed)
    from .backends.triton.gated import gate_backward_kernel

    c = tuning.gemm_config("gate_backward", grad.device, grad.dtype, r.block_m)
    n_tiles = -(-inner // c.block_n)
    grad_h = torch.empty_like(h)
    a = grad.new_empty((rows, inner) if keep_a else 0)
    dots = grad.new_empty(rows, n_tiles, dtype=torch.float32)
    if not rows:
        return grad_h, a, dots
    w, tma = _weight_operand(down, not transposed, c.block_n, c.block_k)
    launch(
        gate_backward_kernel, _grid(c, grad),
        (grad, w, weights, h, grad_h, a, dots, r.perm, r.offsets, r.tiles, r.num_tiles), (),
        (inner, depth, r.top_k, gate.gated, gate.interleaved,
         gate.activation, gate.alpha, gate.limit, gate.up_offset,
         not transposed, keep_a, tma, *_tiling(c, grad, n_tiles)),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return grad_h, a, dots


def weight_grad(
    p: torch.Tensor, q: torch.Tensor, r: Routing, gather: bool, transpose_out: bool
) -> torch.Tensor:
    """(E, P, Q), or (E, Q, P) with `transpose_out`: per expert, its rows' sum of p[row]^T q[row].

    p (S, P) is sorted by expert; q is (S, Q), or (T, Q) with `gather`.
    """
    if backend_name(p) == "torch":
        return torch_ops.weight_grad(p, q, r, gather, transpose_out)
    shape = (q.shape[1], p.shape[1]) if transpose_out else (p.shape[1], q.shape[1])
    out = p.new_empty(r.num_experts, *shape)
    if not p.shape[0]:
        return out.zero_()
    _launch_weight_grad(p, q, out, r, gather, transpose_out, False)
    return out


def add_weight_grad(
    p: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    r: Routing,
    gather: bool,
    transpose_out: bool,
) -> None:
    """Adds what `weight_grad` returns to `out`, contiguous, fp32 or the dtype of p.

    In the GEMM's epilogue, with no pass over `out` besides. Experts without rows stay as they are.
    """
    if not p.shape[0]:
        return
    if backend_name(p) == "torch":
        out.add_(torch_ops.weight_grad(p, q, r, gather, transpose_out))
    else:
        _launch_weight_grad(p, q, out, r, gather, transpose_out, True)


def _launch_weight_grad(p, q, out, r: Routing, gather: bool, transpose_out: bool, add: bool):
    aligned = out.data_ptr() % _TMA_ALIGNMENT == 0
    if gather and aligned and hopper.serves_weight_grad(p, q):
        hopper.weight_grad(p, q, out, r, transpose_out, add)
        return
    from .backends.triton.weight_grad import weight_grad_kernel

    c = tuning.gemm_config("weight_grad", p.device, p.dtype, r.block_m)
    tma = _tma_serves(p)
    strides = (1, p.shape[1]) if transpose_out else (q.shape[1], 1)
    launch(
        weight_grad_kernel, _grid(c, p),
        (ragged(p, (c.block_k, c.block_m)) if tma else p, q, out, r.perm,
         r.offsets), (),
        (p.shape[1], q.shape[1], r.num_experts, r.top_k, gather, *strides, add, tma,
         matmul_precision(p.dtype), c.block_m, c.block_n, c.block_k, *_grid(c, p), c.flatten),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def bias_grad(
    rows: torch.Tensor, weights: torch.Tensor | None, r: Routing, gather: bool, dtype: torch.dtype
) -> torch.Tensor:
    """(E, N): per expert, the sum of its rows (S, N), or of its rows' tokens (T, N).

    Each is multiplied by its routing weight if given. Summed in fp32 over a fixed split of the
    rows, so that the bits do not depend on the schedule.
    """
    if backend_name(rows) == "torch":
        return torch_ops.bias_grad(rows, weights, r, gather, dtype)
    from .backends.triton.weight_grad import bias_grad_kernel

    splits, block_r, block_n = 16, 32, 128
    width = rows.shape[1]
    partial = rows.new_empty(splits, r.num_experts, width, dtype=torch.float32)
    launch(
        bias_grad_kernel, (r.num_experts, splits, -(-width // block_n)),
        (rows, weights, partial, r.perm, r.offsets), (),
        (width, r.num_experts, r.top_k, gather, weights is not None, splits, block_r, block_n),
    )  # fmt: skip
    return partial.sum(0).to(dtype)


def kernel_backends(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What runs each part for operands of this dtype and device: "torch", "triton" or "gluon".

    "gluon" holds for rows that bulk copies can read (multiples of 16 bytes), weight gradients over
    gathered rows, and from 65 rows an expert on: down (transposed: I a multiple of 64), and where H
    is a multiple of 64 gated up (not transposed in halves) and the gate gradient. Else "triton"
    does.
    """
    name = backend_name(torch.empty(0, dtype=dtype, device=device))
    parts = dict.fromkeys(
        ("routing", "up+gate", "down", "combine", "gate gradient", "weight gradients"), name
    )
    if name == "triton" and dtype.itemsize == 2 and hopper.available(device):
        parts["up+gate"] = parts["down"] = parts["weight gradients"] = "gluon"
        if dtype == torch.bfloat16:
            parts["gate gradient"] = "gluon"
    return parts


def _out_in(w: torch.Tensor, transposed: bool) -> tuple[int, int]:
    """(N, K) of a weight (E, N, K), or transposed (E, K, N)."""
    return (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])


def _grid(c: tuning.GemmConfig, operand: torch.Tensor) -> tuple[int]:
    return (num_programs(operand.device) * c.ctas,)


def _tiling(c: tuning.GemmConfig, operand: torch.Tensor, n_tiles: int) -> tuple:
    """The constants with which the signatures of the tiled kernels end."""
    return (
        matmul_precision(operand.dtype), c.block_m, c.block_n, c.block_k, c.group_m,
        n_tiles, *_grid(c, operand), c.flatten,
    )  # fmt: skip


def _tma_serves(matrix: torch.Tensor) -> bool:
    """Whether a bulk copy can read this contiguous matrix.

    It can on Hopper, with rows a multiple of 16 bytes and an aligned base.
    """
    row_bytes = matrix.shape[-1] * matrix.element_size()
    aligned = row_bytes % _TMA_ALIGNMENT == 0 and matrix.data_ptr() % _TMA_ALIGNMENT == 0
    return aligned and has_tma(matrix.device) and matrix.numel() > 0


def _weight_operand(w: torch.Tensor, transposed: bool, block_n: int, block_k: int):
    """(operand, whether by bulk copies) for a contiguous weight, its experts as one matrix.

    Transposed, a tile that reached past K would read the next expert's rows: then the kernel masks
    instead.
    """
    if not _tma_serves(w) or (transposed and w.shape[1] % block_k):
        return w, False
    block = (block_k, block_n) if transposed else (block_n, block_k)
    return Tiles(w, (w.shape[0] * w.shape[1], w.shape[2]), block), True


def _gate_up_operand(w: torch.Tensor, transposed: bool, block_n: int, block_k: int):
    """The same for a concatenated gate and up weight.

    Its 2I columns are split in two so that one box holds both parts.
    """
    experts, inner = w.shape[0], (w.shape[2] if transposed else w.shape[1]) // 2
    if not _tma_serves(w) or (
        transposed and (w.shape[1] % block_k or inner * w.element_size() % _TMA_ALIGNMENT)
    ):
        return w, False
    if transposed:
        return Tiles(w, (experts * w.shape[1], 2, inner), (block_k, 2, block_n)), True
    return Tiles(w, (2 * experts, inner, w.shape[2]), (2, block_n, block_k)), True
