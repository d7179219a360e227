"""The experts for a handful of tokens at inference: two launches, bound by reading the weights.

Shapes: x (T, H), ids and weights (T, K), up (E, U, H) or transposed (E, H, U), down (E, H, I) or
(E, I, H), out (T, H).
"""

from __future__ import annotations

import torch

from .backends.launch import launch
from .device import backend_name, starts_early
from .gates import Gate

_MAX_SLOTS = 32  # from here on, experts are shared so often that sorting pays; H200, Qwen3-30B-A3B
# (columns of the output, depth, warps) of a program, by the memory order of the weights, and how
# many steps of that depth it has in flight: all of them where they are few, else ptxas takes
# minutes (gpt-oss).
_UP_BLOCK = {False: (2, 1024, 2, 8), True: (64, 64, 4, 4)}
_DOWN_BLOCK = {False: (4, 1024, 4, 16), True: (64, 128, 4, 4)}


def serves(x: torch.Tensor, num_slots: int, num_experts: int) -> bool:
    """Whether reading every slot's expert separately costs little more than reading each once.

    So for one token, whose experts differ, and for few slots among many experts.
    """
    if backend_name(x) != "triton" or x.shape[0] == 0:
        return False
    return x.shape[0] == 1 or (num_slots <= _MAX_SLOTS and 2 * num_slots <= num_experts)


def decode(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
    transposed: bool,
) -> torch.Tensor:
    """(T, H): the experts' weighted sum, as `moe.fused_experts`; Triton only, no gradients.

    The same bits on every call. Ids outside [0, E) are sentinels and add nothing.
    """
    from .backends.triton.decode import decode_down_kernel, decode_up_kernel

    tokens, top_k = ids.shape
    experts, hidden, inner = up.shape[0], x.shape[1], down.shape[1 if transposed else 2]
    up_n, up_k, up_warps, up_steps = _UP_BLOCK[transposed]
    down_n, down_k, down_warps, down_steps = _DOWN_BLOCK[transposed]
    up_steps = min(up_steps, -(-hidden // up_k))
    early = starts_early(x.device)
    options = dict(launch_pdl=True) if early else {}
    a = x.new_empty(tokens * top_k, inner)
    out = torch.empty_like(x)
    launch(
        decode_up_kernel, (tokens * top_k, -(-inner // up_n)), (x, ids, up, up_bias, a), (),
        (experts, hidden, inner, top_k, gate.gated, gate.interleaved, gate.activation, gate.alpha,
         gate.limit, gate.up_offset, transposed, up_bias is not None, up_n, up_k, up_steps,
         early),
        num_warps=up_warps, **options,
    )  # fmt: skip
    launch(
        decode_down_kernel, (tokens, -(-hidden // down_n)),
        (a, ids, weights, down, down_bias, out), (),
        (experts, hidden, inner, top_k, transposed, down_bias is not None, down_n, down_k,
         down_steps, early),
        num_warps=down_warps, **options,
    )  # fmt: skip
    return out
