"""The experts layer as its definition reads: the truth that tests compare to.

One expert at a time, in any float dtype.

Shapes: x (T, H), ids and weights (T, K), up (E, U, H) or transposed (E, H, U), down (E, H, I) or
(E, I, H).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .gates import Gate

_SWIGLU = Gate()


def reference_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate: Gate | Callable[[torch.Tensor], torch.Tensor] = _SWIGLU,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    is_transposed: bool = False,
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """(T, H), differentiable in every tensor.

    Reads the routing back to the host, so it is slow on purpose.
    """
    out = torch.zeros_like(x)
    for expert in range(up.shape[0]):
        token, slot = torch.where(top_k_index == expert)
        w_up, w_down = up[expert], down[expert]
        h = x[token] @ (w_up if is_transposed else w_up.T)
        if up_bias is not None:
            h = h + up_bias[expert]
        y = gate(h) @ (w_down if is_transposed else w_down.T)
        if down_bias is not None:
            y = y + down_bias[expert]
        if post_norm is not None:
            y = post_norm(y)
        out = out.index_add(0, token, (y * top_k_weights[token, slot, None]).to(x.dtype))
    return out
