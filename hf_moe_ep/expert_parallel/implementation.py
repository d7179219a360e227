"""`ep_implementation="fastmoe"`: what transformers calls in place of an experts module's forward.

Shapes: hidden_states (T, H), top_k_index (T, K) global ids, top_k_weights (T, K).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from itertools import count, groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed import expert_parallel as upstream

from ..experts import NAMES
from .agreement import agree
from .autograd import Combine, Dispatch, noted
from .exchange import Exchange, GatherExchange, NodesExchange, RowsExchange
from .symmetric import SymmetricExchange, reachable

logger = logging.getLogger(__name__)

GATHER_UP_TO = 4  # ranks; with more, sending only the rows that are wanted saves a quarter or more


class FastMoEEP(upstream.EPImplementation):
    """A token's row goes once to each rank that holds one of its experts; one partial sum returns.

    The experts (`experts_implementation="fastmoe"`; grouped_mm runs too) sort the received rows
    themselves and skip the ids of other ranks' experts. Where the EP group is the TP group, all
    ranks hold the same tokens already: each runs its own experts on all of them, and the outputs
    are summed, in transformers' `AllReduceEP`.

    Rows travel as all ranks' NVLink or network allow, see `make_exchange`. Before a layer's
    exchange the ranks compare a few integers on the host (`agreement.agree`), so that token counts
    may differ, also to zero, and a rank that stopped is named. Sums are in fp32 and in rank order:
    the same inputs give the same bits.

    A forward waits once for the device, for the number of rows; for up to 8192 slots, in a CUDA
    graph and with HF_MOE_EP_WAIT=0 never. The experts' buffers then have room for all tokens'
    experts being here: as many times as much as is used on average as there are ranks.

    Raises, when called: what `agree` raises. An error of a collective, in backward too, has the
    layer and the rank in its notes. ValueError for eager experts that train.
    """

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.config = experts.config
        self.group = ep_mesh.get_group()
        self.layer = next(_layers(self.group))
        ranks = dist.get_process_group_ranks(self.group)
        self.where = f"MoE layer {self.layer} on rank {dist.get_rank()} of the EP group {ranks}"
        if self.shares_batch:
            self.shared = upstream.AllReduceEP(experts, ep_mesh, tp_mesh)
        else:
            self.exchange = make_exchange(self.group, self.num_local_experts)

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H): the weighted sum of each token's experts, wherever they are."""
        with noted(f"in {self.where}"):
            return self._call(hidden_states, top_k_index, top_k_weights)

    def _call(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._refuse_wrong_gradients(hidden_states.dtype)
        if self.shares_batch:
            return self.shared(hidden_states, top_k_index, top_k_weights)
        own = (hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() > 1:  # the ranks of a TP group hold the same tokens: each takes some
            own = [_redistribute(t, self.tp_mesh, Replicate(), Shard(0)) for t in own]
        out = self._exchanged(*own)
        if self.tp_mesh.size() > 1:
            out = _redistribute(out, self.tp_mesh, Shard(0), Replicate(), hidden_states.shape)
        return out

    def _refuse_wrong_gradients(self, dtype: torch.dtype) -> None:
        if self.config._experts_implementation == "eager":
            # A rank without tokens would leave the graph, and the others' backward wait for it.
            raise ValueError(
                'experts_implementation="eager" does not train under ep_implementation="fastmoe": '
                'use "fastmoe" or "grouped_mm"'
            )
        # FSDP2 divides twice by the factor that transformers 5.23 sets on experts without copies,
        # in any dtype but these two: their gradients come out smaller by dp_size, silently.
        layout = getattr(self.config, "distributed_config", None)
        divided = layout is not None and layout.efsdp_size == 1 and layout.dp_size > 1
        if divided and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{dtype} gradients of experts come out {layout.dp_size} times too small under "
                f"FSDP2 with ep_size={layout.ep_size} and one copy of each expert: train in "
                "bfloat16 or float32, or with a smaller ep_size"
            )

    def _exchanged(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        lengths = agree(self.group, self.layer, x, ids, weights)
        if not any(lengths):
            return x + 0.0 * weights.sum()  # nobody has a token: keep the graph, send nothing
        fastmoe = self.config._experts_implementation in NAMES
        rows, ids, weights, layout, routing = Dispatch.apply(
            x.contiguous(), weights, ids, self.exchange, lengths, fastmoe, self.where
        )
        options = {"routing": routing, "place": layout.place} if fastmoe else {}
        ids = ids if fastmoe else ids.long()  # eager experts take no other type
        if not rows.shape[0]:
            # One row for no expert: not every experts implementation takes none, and the empty
            # rows must stay in the graph, whose backward is a collective.
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            ids = ids.new_full((1, ids.shape[1]), self.num_local_experts)
            weights = torch.cat([weights, weights.new_zeros(1, weights.shape[1])])
            return Combine.apply(self.experts_forward(rows, ids, weights)[:0], layout, self.where)
        return Combine.apply(
            self.experts_forward(rows, ids, weights, **options), layout, self.where
        )


class AutoEP(upstream.AutoEP):
    """`ep_implementation="auto"`: `FastMoEEP` for fastmoe experts, transformers' own for others."""

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.fastmoe = FastMoEEP(experts, ep_mesh, tp_mesh)

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        if self.fastmoe.config._experts_implementation in NAMES:
            return self.fastmoe(hidden_states, top_k_index, top_k_weights)
        return super().__call__(hidden_states, top_k_index, top_k_weights)


def make_exchange(group: ProcessGroup, experts: int) -> Exchange:
    """The way that rows of `group`, with `experts` experts a rank, travel. All ranks choose alike.

    Over NVLink where every GPU reads every other's memory, else by collectives: one row per token
    and node where the group spans nodes (of HF_MOE_EP_RANKS_PER_NODE ranks, by default torchrun's
    LOCAL_WORLD_SIZE), all rows to all of few ranks, the wanted rows to many.
    HF_MOE_EP_EXCHANGE=symmetric|nodes|gather|rows chooses by hand.

    Raises:
        ValueError: HF_MOE_EP_EXCHANGE names no way, or one that these ranks cannot go.
    """
    way = os.environ.get("HF_MOE_EP_EXCHANGE") or _best_way(group)
    if way == "symmetric" and reachable(group):
        return SymmetricExchange(group, experts)
    if way == "nodes" and (groups := _node_groups(group)):
        return NodesExchange(*groups, experts)
    if way == "gather":
        return GatherExchange(group, experts)
    if way == "rows":
        return RowsExchange(group, experts)
    raise ValueError(
        f"HF_MOE_EP_EXCHANGE={way}: use gather or rows, symmetric where all GPUs of the group read "
        "each other's memory, or nodes where the group fills several nodes evenly"
    )


@cache
def _best_way(group: ProcessGroup) -> str:
    if reachable(group):
        return "symmetric"
    if _node_groups(group):
        return "nodes"
    way = "gather" if dist.get_world_size(group) <= GATHER_UP_TO else "rows"
    if dist.get_backend(group) == "nccl" and dist.get_rank(group) == 0:
        logger.warning(
            "expert parallelism over NCCL (HF_MOE_EP_EXCHANGE=%s): the GPUs of ranks %s cannot "
            "read each other's memory",
            way,
            dist.get_process_group_ranks(group),
        )
    return way


@cache
def _node_groups(group: ProcessGroup) -> tuple[ProcessGroup, ProcessGroup] | None:
    """(across, inside) for a group that fills several nodes evenly, else None."""
    ranks = dist.get_process_group_ranks(group)
    size = int(os.environ.get("HF_MOE_EP_RANKS_PER_NODE") or os.environ.get("LOCAL_WORLD_SIZE", 0))
    if not size:
        return None
    nodes = [list(node) for _, node in groupby(ranks, lambda rank: rank // size)]
    if len(nodes) < 2 or len({len(node) for node in nodes}) > 1 or len(nodes[0]) < 2:
        return None
    me = dist.get_rank()
    inside = next(node for node in nodes if me in node)
    across = [node[inside.index(me)] for node in nodes]
    return tuple(
        dist.new_group(part, backend=dist.get_backend(group), use_local_synchronization=True)
        for part in (across, inside)
    )


@cache
def _layers(group: ProcessGroup) -> Iterator[int]:
    """Numbers the experts modules of a group, 0 for the first: a layer's name in errors."""
    return count()


def _redistribute(t: Tensor, mesh, source, target, shape: torch.Size | None = None) -> Tensor:
    """`t` laid out as `target` instead of `source` over the mesh, as a plain tensor.

    The transpose in backward is DTensor's.
    """
    sizes = {} if shape is None else dict(shape=shape, stride=(shape[1], 1))
    placed = DTensor.from_local(t.contiguous(), mesh, [source], run_check=False, **sizes)
    return placed.redistribute(mesh, [target]).to_local()
