"""Gradient checkpointing that routes once: the recompute takes the experts that the forward chose.

A token whose router logits are nearly tied may fall to another expert when they are computed again,
and then the gradients are those of another function than the forward's.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def keep_routing() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint` that keeps the chosen indices.

    Every `topk` of the forward keeps its indices, (T, K) int64, 8 bytes each; that of the recompute
    returns them, with the values that stand there now, so that gradients are those of the logits.
    Everything else is recomputed. With transformers:

        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": hf_moe_ep.expert_parallel.keep_routing}
        )

    (torch's own `create_selective_checkpoint_contexts` would keep the values too, which routers
    change in place: softmax, topk, then `/=` their sum.)
    """
    kept: list[torch.Tensor] = []
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.kept.append(out[1].clone())
        return out


class _Replay(TorchDispatchMode):
    """In the order of the forward, anew for every recompute."""

    def __init__(self, kept: list[torch.Tensor]):
        super().__init__()
        self.kept = kept

    def __enter__(self):
        self.next = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))
        indices = next(self.next).clone()
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        return args[0].gather(dim, indices), indices
