"""What the ranks of an EP group tell each other on the host before each forward of a layer.

A few integers over gloo, while the device works on: it finds ranks that disagree, or are gone,
before a collective on the device could hang.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Facts:
    """One rank's view of one call. All but `tokens` must be equal on every rank."""

    layer: int  # which of the group's experts modules this is, in the order of set-up. 3
    hidden: int  # H. 2048
    top_k: int  # K. 8
    dtype: int  # of the hidden states, an index into _DTYPES. 1
    x_grad: int  # whether the hidden states need a gradient. 1
    weights_grad: int  # whether the routing weights do. 1
    tokens: int  # T; may differ. 16384


@cache
def host_group(group: ProcessGroup) -> ProcessGroup:
    """The group itself where it is gloo's, else a gloo group of the same ranks."""
    if dist.get_backend(group) == "gloo":
        return group
    return dist.new_group(
        dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
    )


def agree(group: ProcessGroup, layer: int, x, ids, weights) -> list[int]:
    """The number of tokens of every rank, once all ranks agree on everything else.

    x (T, H), ids and weights (T, K).

    Raises:
        ValueError: on every rank, where the ranks' calls do not fit together; names the ranks.
        RuntimeError: a rank is gone, or did not come within the group's timeout; names this rank,
            those that are missing where they can be told, and the layer.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"hidden states must be one of {_DTYPES}, got {x.dtype}")
    grad = torch.is_grad_enabled()
    mine = Facts(
        layer, x.shape[1], ids.shape[1], _DTYPES.index(x.dtype),
        int(grad and x.requires_grad), int(grad and weights.requires_grad), x.shape[0],
    )  # fmt: skip
    everyone = [Facts(*row) for row in _gather(group, astuple(mine), layer)]
    ranks = dist.get_process_group_ranks(group)
    for name in (f.name for f in fields(Facts) if f.name != "tokens"):
        values = [getattr(facts, name) for facts in everyone]
        if len(set(values)) > 1:
            shown = [_DTYPES[v] for v in values] if name == "dtype" else values
            table = ", ".join(f"rank {r}: {v}" for r, v in zip(ranks, shown, strict=True))
            raise ValueError(
                f"the ranks of an expert-parallel group disagree on {name} ({table}); all ranks "
                "must run the same layers, on inputs of one dtype, with and without gradients alike"
            )
    return [facts.tokens for facts in everyone]


def _gather(group: ProcessGroup, mine: tuple[int, ...], layer: int) -> list[list[int]]:
    row = torch.tensor(mine)
    everyone = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(everyone, row, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} waited in MoE layer {layer} for the other ranks of its "
            f"expert-parallel group {dist.get_process_group_ranks(group)}, and {_missing(group)}; "
            "the cause is in the log of the rank that stopped first"
        ) from error
    return torch.stack(everyone).tolist()


def _missing(group: ProcessGroup) -> str:
    """Who does not answer, by gloo's own barrier, which the group's first rank watches."""
    try:
        dist.monitored_barrier(group, timeout=timedelta(seconds=5), wait_all_ranks=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "one of them stopped answering"
