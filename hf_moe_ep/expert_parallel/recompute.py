"""Gradient checkpointing that routes once: the recompute takes the experts that the forward chose.

A token whose router logits are nearly tied may fall to another expert when they are computed again,
and then the gradients are those of another function than the forward's.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, torch.Tensor.topk)


def keep_routing() -> tuple[TorchFunctionMode, TorchFunctionMode]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint` that keeps the chosen indices.

    Every `topk` of the forward keeps its indices, (T, K) int64, 8 bytes each; that of the recompute
    returns them, with the values that stand there now, so that gradients are those of the logits.
    Everything else is recomputed. With transformers:

        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": hf_moe_ep.expert_parallel.keep_routing}
        )

    (torch's own `create_selective_checkpoint_contexts` would keep the values too, which routers
    change in place: softmax, topk, then `/=` their sum.) Not for layers that are compiled:
    torch.compile raises.
    """
    kept: list[torch.Tensor] = []
    return _Keep(kept), _Replay(kept)


class _TopK(TorchFunctionMode):
    """`topk` as a choice of indices and a gather: autograd sees the same in both passes."""

    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _TOPK or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        return self.topk(func, *args, **kwargs)

    def topk(self, func, input, k, dim=-1, largest=True, sorted=True, **_):
        indices = self.choose(func, input, k, dim, largest, sorted)
        return torch.return_types.topk((input.gather(dim, indices), indices))


class _Keep(_TopK):
    def choose(self, func, input, *how) -> torch.Tensor:
        indices = func(input.detach(), *how).indices
        self.kept.append(indices.clone())
        return indices


class _Replay(_TopK):
    """In the order of the forward, anew for every recompute."""

    def __enter__(self):
        self.next = iter(self.kept)
        return super().__enter__()

    def choose(self, *_) -> torch.Tensor:
        return next(self.next).clone()
