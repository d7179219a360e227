"""Compiles the kernels of a step side by side, before the first of its kind, in training or not.

Left alone Triton compiles each at its first launch, one after the other: 10 s for Qwen3-30B-A3B (an
H200's 16 cores, empty cache). Shapes as in `autograd`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import hopper, ops
from .autograd import FusedExperts, Layer, fused_forward
from .backends import CHUNK
from .device import backend_name

_compiled: set[tuple] = set()  # kinds of steps whose kernels this process has


def compile_step(
    x: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, ids: Tensor, gate: str, transposed: bool, recompute: bool,
    accumulating: tuple[Tensor | None, Tensor | None], block_m: int,
) -> None:  # fmt: skip
    """For the step that is about to run on these operands; returns at once if it knows its kind.

    Runs the layer on one token without experts, its ops each in a thread of their own. Memory
    meanwhile: twice the weight gradients of up to 16 experts. What fails here fails again in the
    step itself, which then says so.
    """
    operands = (x, weights, up, down, up_bias, down_bias)
    experts = few(up.shape[0])
    added = tuple(w if w is None else w.main_grad.dtype for w in accumulating)
    how = (gate, transposed, recompute, added, block_m, ids.shape[1], ids.dtype, experts)
    kind = (*how, x.device, *(_kind(t) for t in operands))
    if not _begins(kind, x):
        return

    def step() -> None:
        no_experts = _route_none(ids, up.shape[0], block_m)
        token = [t.new_zeros(1, t.shape[1]).requires_grad_(t.requires_grad) for t in operands[:2]]
        stacks = [
            None if w is None else w.detach()[:experts].requires_grad_(w.requires_grad)
            for w in operands[2:]
        ]
        for w, dtype in zip(stacks[:2], added, strict=True):
            if dtype is not None:
                w.main_grad = torch.empty_like(w, dtype=dtype)
        into = tuple(None if d is None else w for w, d in zip(stacks[:2], added, strict=True))
        out = FusedExperts.apply(
            *token, *stacks, no_experts, gate, transposed, recompute,
            into, None, block_m, *_no_rows(ids, experts),
        )  # fmt: skip
        with torch.no_grad():
            FusedExperts.backward(out.grad_fn, torch.zeros_like(out))

    ops.side_by_side(step, x)


def compile_forward(
    x: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, ids: Tensor, gate: str, transposed: bool, block_m: int,
) -> None:  # fmt: skip
    """The same for a call without gradients, and for the single tokens that follow a prompt."""
    layout = (gate, transposed, block_m, ids.shape[1], ids.dtype, weights.dtype)
    kind = (*layout, x.device, up.dtype, up.shape, down.shape, up_bias is None, down_bias is None)
    if not _begins(kind, x):
        return
    experts = few(up.shape[0])

    def forward() -> None:
        no_experts = _route_none(ids, up.shape[0], block_m)
        token, no_weights = (t.new_zeros(1, t.shape[1]) for t in (x, weights))
        stacks = [
            None if w is None else w.detach()[:experts] for w in (up, down, up_bias, down_bias)
        ]
        layer = Layer(_no_rows(ids, experts), block_m, ids.shape[1], transposed)
        fused_forward(token, no_weights, *stacks, layer, gate, False)
        ops.decode(token, no_experts, no_weights, *stacks, gate, transposed)

    ops.side_by_side(forward, x)


def _begins(kind: tuple, x: Tensor) -> bool:
    """Whether a step of this kind is the first and has something to compile; then Triton is up."""
    if kind in _compiled or not _serves(x):
        return False
    _compiled.add(kind)
    if x.is_cuda:
        _start_triton(x.device)
    return True


def _route_none(ids: Tensor, num_experts: int, block_m: int) -> Tensor:
    """(1, K) ids of no expert; both forms of the routing, for few slots and for many, have run."""
    many = ids.new_full((CHUNK // ids.shape[1] + 1, ids.shape[1]), num_experts)
    for slots in (many, many[:1]):
        ops.route(slots, num_experts, block_m)
    return many[:1]


def _start_triton(device: torch.device) -> None:
    """Triton's driver and imports, by one thread: threads that import at once may see halves.

    And what all cache keys share, a digest of Triton's own files and ptxas's version: threads that
    begin together would all compute it, a third of a second each.
    """
    from triton.compiler import make_backend
    from triton.runtime import cache, driver
    from triton.tools import tensor_descriptor  # noqa: F401

    make_backend(driver.active.get_current_target()).hash()
    if (digest := getattr(cache, "triton_key", None)) is not None:
        digest()
    if hopper.available(device):
        from .backends.gluon import gated, linear, up, weight_grad  # noqa: F401


def few(experts: int) -> int:
    """A smaller number of experts for which Triton compiles the same: 1, a multiple of 16, or not.

    E.g. 16 for 128, 2 for 9.
    """
    return 1 if experts == 1 else 2 if experts % 16 else 16


def _serves(x: Tensor) -> bool:
    """Where something is compiled.

    Not while a graph is recorded, which other threads would spoil, or under a mode that sees every
    op.
    """
    if x.device.type != "cuda" or backend_name(x) != "triton":
        return False
    return not (torch.cuda.is_current_stream_capturing() or is_in_torch_dispatch_mode())


def _kind(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.dtype, tuple(t.shape[1:]), t.requires_grad)


def _no_rows(ids: Tensor, experts: int) -> list[Tensor]:
    """`Routing.tensors()` of one token whose slots belong to no expert: no tile, no row."""
    top_k = ids.shape[1]
    perm, offsets, tiles, num_tiles = (
        ids.new_zeros(shape, dtype=torch.int32) for shape in (top_k, experts + 1, (1, 2), 1)
    )
    return [perm, torch.full_like(perm, -1), offsets, tiles, num_tiles]
