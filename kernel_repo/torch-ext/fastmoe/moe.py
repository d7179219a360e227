"""The door of the package: one call that validates inputs, builds the routing and runs the experts.

Shapes: T tokens, H hidden, I intermediate, E experts, K experts a token; S = T*K rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from . import decode, ops, tuning
from .ahead import compile_forward, compile_step
from .autograd import Combine, FusedExperts, GroupedLinear, Layer, fused_forward
from .backends.replay import replayed
from .device import backend_name, matmul_precision
from .gates import Gate
from .routing import Routing

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SWIGLU = Gate()
_REPEATED_SLOTS = 8192  # with more, an H200 works longer than the host


def fused_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gate: Gate | Callable[[Tensor], Tensor] = _SWIGLU,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    is_transposed: bool = False,
    post_norm: Callable[[Tensor], Tensor] | None = None,
    routing: Routing | Callable[[], Routing] | None = None,
    recompute: bool = False,
    place: Callable[[int, torch.dtype], Tensor] | None = None,
) -> Tensor:
    """out[t] = sum over k of top_k_weights[t, k] * expert[top_k_index[t, k]](x[t]).

    Differentiable in every float input.

    Args:
        x: (T, H) in any float dtype; cast to the weights' dtype, the result is cast back.
        top_k_index: (T, K) int32 or int64. An id of E or more is a sentinel, an expert of another
            rank: it takes no part in any GEMM and its gradients are exactly zero.
        top_k_weights: (T, K) in any float dtype.
        up: (E, U, H), U = 2I with a gated `gate` and I without; (E, H, U) if `is_transposed`.
        down: (E, H, I), or (E, I, H) if `is_transposed`.
        gate: a `Gate`, fused into the GEMMs, or any function (S, U) -> (S, I), which runs as
            written between them.
        up_bias, down_bias: (E, U) and (E, H).
        post_norm: a function (S, H) -> (S, H) of each expert's output before it is weighted.
        routing: what `route_experts` made of these ids before, so that the caller may know how many
            rows it has; buffers get as many as its perm instead of T*K. Or a function that gives
            it, called when everything else is ready, because it may have to wait for that number.
        recompute: keep x and the routing alone between forward and backward, and project up again
            in backward: a fifth more GEMM work, and the same bits.
        place: called with H and a dtype just before the result, and in backward the gradient of x,
            is computed: contiguous memory (T, H) to write it to, for a caller who needs it in a
            certain place. Paths that do not call it return a tensor of their own.

    Returns:
        (T, H) in the dtype of x. The same inputs give the same bits. Nothing waits for the device,
        shapes and grids do not depend on the routing, so the call captures into a CUDA graph and
        compiles with fullgraph=True.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together (a main_grad's too), second
            derivatives; with
            HF_MOE_EP_CHECK=1 also negative ids, sentinels with a weight, and values that are not
            finite (this waits for the device).

    Memory between forward and backward: x, the up projection (S, U) and the routing, nothing else
    (the scheme of SonicMoE, arXiv 2512.14080). A `gate` function or `post_norm` also keeps what
    autograd keeps for it, and with `recompute` runs once more in backward.

    Gradient accumulation in place: where `up` or `down` has an attribute `main_grad` (the
    convention of Megatron-LM's gradient_accumulation_fusion), contiguous, of its shape, in its
    dtype or fp32, backward adds its gradient there in the GEMM's epilogue, gives autograd None and
    sets `grad_added_to_main_grad` to True. Under torch.compile the gradient goes to autograd.
    """
    operands = (x, top_k_index, top_k_weights, up, down, up_bias, down_bias)
    how = (gate, is_transposed, recompute, post_norm, routing, place)
    if post_norm is routing is place is None and _repeats(operands, gate):
        return replayed(_experts, operands, how, matmul_precision(up.dtype))
    return _experts(*operands, *how)


def _repeats(operands: tuple[Tensor | None, ...], gate) -> bool:
    """Whether the calls of this kind differ in addresses alone, and the host's time may count.

    That is inference with a gate of the kernels' own, which nobody traces or checks.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        return False
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not isinstance(gate, Gate):
        return False
    x, ids, _, up = operands[:4]
    if x.dtype != up.dtype or ids.numel() > _REPEATED_SLOTS:
        return False
    return os.environ.get("HF_MOE_EP_CHECK") != "1"


def _experts(
    x, top_k_index, top_k_weights, up, down, up_bias, down_bias,
    gate, is_transposed, recompute, post_norm, routing, place,
) -> Tensor:  # fmt: skip
    """`fused_experts`, looking at everything."""
    accumulating = _accumulating("up", up), _accumulating("down", down)
    up, down, is_transposed = _plain_layout(up, down, is_transposed)
    gated = not isinstance(gate, Gate) or gate.gated
    _validate(
        x,
        top_k_index,
        top_k_weights,
        up,
        down,
        up_bias,
        down_bias,
        is_transposed,
        gated,
        isinstance(gate, Gate),
    )
    if os.environ.get("HF_MOE_EP_CHECK") == "1":
        _check_values(x, top_k_index, top_k_weights, up.shape[0])

    operands = (
        x.to(up.dtype).contiguous(),
        top_k_weights.contiguous(),
        up,
        down,
        up_bias,
        down_bias,
    )
    ids = top_k_index.contiguous()
    how = (is_transposed, recompute, accumulating, routing)
    if isinstance(gate, Gate) and post_norm is None:
        out = _fused(*operands, ids, gate, *how, place)
    else:
        out = _as_written(*operands, ids, gate, post_norm, *how)
    return out.to(x.dtype)


def _fused(
    x, weights, up, down, up_bias, down_bias, ids, gate: Gate,
    transposed, recompute, accumulating, routing, place,
) -> Tensor:  # fmt: skip
    """The path whose gate the kernels know: differentiable, for inference, or for a few tokens."""
    operands = (x, weights, up, down, up_bias, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        kind = (gate.spec(), transposed, recompute, accumulating)
        before = partial(compile_step, *operands, ids, *kind)
        block_m, parts = _route(x, ids, up.shape[0], routing, before)
        how = (*kind, place, block_m)
        return FusedExperts.apply(*operands, ids, *how, *parts)
    if decode.serves(x, ids.numel(), up.shape[0]):
        return ops.decode(x, ids, weights, up, down, up_bias, down_bias, gate.spec(), transposed)
    before = partial(compile_forward, *operands, ids, gate.spec(), transposed)
    block_m, parts = _route(x, ids, up.shape[0], routing, before)
    layer = Layer(list(parts), block_m, ids.shape[1], transposed)
    return fused_forward(*operands, layer, gate.spec(), False, place)[0]


def _as_written(
    x, weights, up, down, up_bias, down_bias, ids, gate, post_norm,
    transposed, recompute, accumulating, routing,
) -> Tensor:  # fmt: skip
    """The path whose gate or norm is the model's own code, run by autograd on rows by expert."""
    block_m, parts = _route(x, ids, up.shape[0], routing)
    layout = (ids.shape[1], transposed, block_m, *parts)

    def layer(x, weights, up, down, up_bias, down_bias):
        h = GroupedLinear.apply(x, up, up_bias, True, accumulating[0], *layout)
        a = gate(h).to(down.dtype).contiguous()
        y = GroupedLinear.apply(a, down, down_bias, False, accumulating[1], *layout)
        if post_norm is not None:
            y = post_norm(y).contiguous()
        return Combine.apply(y, weights, block_m, *parts)

    operands = (x, weights, up, down, up_bias, down_bias)
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *operands, use_reentrant=False)
    return layer(*operands)


def route_experts(x: Tensor, top_k_index: Tensor, num_experts: int, share: int = 1) -> Routing:
    """The routing that `fused_experts` would build for x (T, H) and these ids (T, K).

    `share`: about one id in so many is no sentinel, as on one of so many ranks; tiles are chosen by
    it. Once the caller knows the number of rows, `Routing.cut` fits every buffer to it.
    """
    block_m = _block_m(x, top_k_index, num_experts, share)
    return Routing(*ops.route(top_k_index, num_experts, block_m), block_m, top_k_index.shape[1])


def _route(x: Tensor, ids: Tensor, num_experts: int, routing, before=None):
    """(block_m, Routing.tensors()); a tile map only where Triton runs.

    `before` is called with block_m once that is known, before the routing is built here.
    """
    if callable(routing):
        routing = routing()
    block_m = _block_m(x, ids, num_experts) if routing is None else routing.block_m
    if before is not None and not torch.compiler.is_compiling():
        before(block_m)
    if routing is None:
        routing = Routing(*ops.route(ids, num_experts, block_m), block_m, ids.shape[1])
    return block_m, routing.tensors()


def _block_m(x: Tensor, ids: Tensor, num_experts: int, share: int = 1) -> int:
    triton = backend_name(x) == "triton"
    return tuning.bucket(ids.numel() // share, num_experts) if triton else 0


def _plain_layout(up: Tensor, down: Tensor, transposed: bool) -> tuple[Tensor, Tensor, bool]:
    """The weights as contiguous stacks; a pair of transposed views is read as the other layout."""
    if up.dim() == 3 and down.dim() == 3 and not up.is_contiguous() and not down.is_contiguous():
        if up.mT.is_contiguous() and down.mT.is_contiguous():
            return up.mT, down.mT, not transposed
    return up.contiguous(), down.contiguous(), transposed


def _accumulating(name: str, w: Tensor) -> Tensor | None:
    """The weight, where its gradient goes into its `main_grad`. Compiled, autograd's way serves."""
    if not torch.is_grad_enabled() or not w.requires_grad or torch.compiler.is_compiling():
        return None
    main_grad = getattr(w, "main_grad", None)
    if main_grad is None:
        return None
    if (
        main_grad.shape != w.shape
        or main_grad.dtype not in (torch.float32, w.dtype)
        or main_grad.device != w.device
        or not (main_grad.is_contiguous() and w.is_contiguous())
    ):
        raise ValueError(
            f"{name}.main_grad must be a contiguous tensor like {name}, {_shape(w)} {w.dtype} on "
            f"{w.device}, or the same in float32, and {name} contiguous; got {_shape(main_grad)} "
            f"{main_grad.dtype} on {main_grad.device}"
        )
    return w


def _validate(x, ids, weights, up, down, up_bias, down_bias, transposed, gated, fused) -> None:
    if up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            f"up and down must be stacks of matrices (E, ., .), got {_shape(up)} and {_shape(down)}"
        )
    for name, t in (("up", up), ("down", down)):
        if t.dtype not in _FLOATS:
            raise ValueError(
                f"{name} has dtype {t.dtype}: quantised experts are not supported; dequantise the "
                'model or use experts_implementation="grouped_mm"'
            )
    experts, width, hidden = up.shape if not transposed else (up.shape[0], up.shape[2], up.shape[1])
    _, out_width, inner = (
        down.shape if not transposed else (down.shape[0], down.shape[2], down.shape[1])
    )
    if x.dim() != 2 or x.shape[1] != hidden or not x.is_floating_point():
        raise ValueError(
            f"x must be (T, {hidden}) floats to match up {_shape(up)}, got {_shape(x)} {x.dtype}"
        )
    if (
        ids.dim() != 2
        or ids.dtype not in (torch.int32, torch.int64)
        or ids.shape[0] != x.shape[0]
        or not ids.shape[1]
    ):
        raise ValueError(
            f"top_k_index must be ({x.shape[0]}, K) int32 or int64, got {_shape(ids)} {ids.dtype}"
        )
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise ValueError(
            f"top_k_weights must be {_shape(ids)} floats, got {_shape(weights)} {weights.dtype}"
        )
    expected = 2 * inner if gated else inner
    if down.shape[0] != experts or out_width != hidden or (fused and width != expected):
        raise ValueError(
            f"up {_shape(up)} and down {_shape(down)} do not belong together with "
            f"is_transposed={transposed} and {'a gated' if gated else 'an ungated'} activation: "
            f"expected up {(experts, expected, hidden)} and down {(experts, hidden, inner)}, "
            "each with its last two dimensions swapped if is_transposed"
        )
    for name, bias, n in (("up_bias", up_bias, width), ("down_bias", down_bias, hidden)):
        if bias is not None and (tuple(bias.shape) != (experts, n) or bias.dtype != up.dtype):
            raise ValueError(
                f"{name} must be {(experts, n)} {up.dtype}, got {_shape(bias)} {bias.dtype}"
            )
    if down.dtype != up.dtype:
        raise ValueError(
            f"up is {up.dtype} and down {down.dtype}; both weights must share one dtype"
        )
    others = (ids, weights, up, down, up_bias, down_bias)
    if any(t is not None and t.device != x.device for t in others):
        names = ("x", "top_k_index", "top_k_weights", "up", "down", "up_bias", "down_bias")
        named = zip(names, (x, *others), strict=True)
        devices = {name: t.device for name, t in named if t is not None}
        raise ValueError(f"all inputs must be on one device, got {devices}")


def _check_values(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int) -> None:
    """The checks that wait for the device (HF_MOE_EP_CHECK=1)."""
    if ids.numel() == 0:
        return
    if int(ids.min()) < 0:
        raise ValueError(
            f"top_k_index holds the negative id {int(ids.min())}; "
            f"ids run from 0 to {num_experts - 1}"
        )
    weighted = (ids >= num_experts) & (weights != 0)
    if bool(weighted.any()):
        raise ValueError(
            f"top_k_index holds id {int(ids[weighted][0])} with a routing weight, but there are "
            f"{num_experts} experts here; an id past the last expert marks an expert of another "
            "rank and must have weight 0"
        )
    for name, t in (("x", x), ("top_k_weights", weights)):
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{name} holds values that are not finite (NaN or infinity)")


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
