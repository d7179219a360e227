"""How evenly the router spreads tokens over experts, sampled by hooks and summed on the device.

Counts routed rows as the experts get them: global expert ids, padding included, and twice under
gradient checkpointing, which changes no ratio. M MoE layers, E experts (the most of any layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .flops import is_experts, num_experts


@dataclass(frozen=True)
class ExpertLoad:
    """Balance of one window. Example: 4 experts got 6, 2, 0, 0 rows: 3.0 and 0.5."""

    max_over_mean: float  # rows of the busiest expert over those of the average; mean over layers
    worst_max_over_mean: float  # the same, of the layer where it is largest
    idle_share: float  # share of experts that got no row; mean over layers


class ExpertLoadSampler:
    """Counts rows per expert while `active`; hooks every experts module of the model.

    The hooks stay and the flag flips, because torch.compile does not see hooks that come later.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        modules = [m for m in model.modules() if is_experts(m)]
        self.experts_per_layer = [num_experts(m) for m in modules]
        columns = max(self.experts_per_layer, default=0) + 1  # the last: ids that are no expert
        self.rows = torch.zeros(len(modules), columns, dtype=torch.int64, device=device)
        self.active = False
        self._handles = [
            m.register_forward_pre_hook(self._hook(rows), with_kwargs=True)
            for rows, m in zip(self.rows, modules, strict=True)
        ]

    def _hook(self, rows: torch.Tensor):
        # A row of self.rows, not its number: torch.compile would compile each layer anew for that.
        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.active and module.training:
                ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                ids = ids.detach().flatten().long().clamp(max=rows.shape[0] - 1)
                rows.scatter_add_(0, ids, torch.ones_like(ids))

        return count

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


def summarise(rows: list[list[int]], experts_per_layer: list[int]) -> ExpertLoad | None:
    """Balance from rows per layer and expert, over the layers that got any; None if none did."""
    ratios, idle = [], []
    for layer, experts in zip(rows, experts_per_layer, strict=True):
        counts = layer[:experts]
        if total := sum(counts):
            ratios.append(max(counts) * experts / total)
            idle.append(counts.count(0) / experts)
    if not ratios:
        return None
    return ExpertLoad(sum(ratios) / len(ratios), max(ratios), sum(idle) / len(idle))
