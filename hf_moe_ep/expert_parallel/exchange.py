"""How a token's row reaches the ranks of its experts and how their partial sums come back.

Shapes: n ranks in the group, T tokens here, H hidden, K experts a token, R rows received. A token
goes to a rank at most once; its K ids and routing weights travel with it. Rank r of a group holds
the experts [r * experts, (r + 1) * experts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernel import get_kernel

fastmoe = get_kernel()

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before 2.13
NOWHERE = torch.iinfo(torch.int32).max  # the id, in a padding row, of an expert on no rank


class Layout(Protocol):
    """Where one batch's rows are: two linear maps, each the other's transpose."""

    place: Callable[[int, torch.dtype], Tensor] | None
    """Given W and a dtype: memory (R, W) where `collect` wants its first array, if anywhere."""

    def send(self, x: Tensor) -> Tensor:
        """(T, W) -> (R, W): each token's row to every rank that holds one of its experts."""

    def collect(self, *arrays: Tensor) -> list[Tensor]:
        """(R, W) -> (T, W) each: the sum of a token's rows over the ranks, fp32, in rank order."""


@dataclass(frozen=True)
class Plan:
    """Which rows come here, and for which experts. A row without ids here may hold anything."""

    ids: Tensor  # (R, K) int32 local ids; `experts` is the sentinel, an expert elsewhere. [[0, 4]]
    weights: Tensor  # (R, K) in the dtype of the routing weights, 0 at sentinels. [[0.7, 0.0]]
    layout: Layout
    slots: int | None = None  # how many ids are no sentinels, where the host knows. 1


class Exchange(Protocol):
    """One way of moving rows within a group."""

    def plan(self, ids: Tensor, weights: Tensor, lengths: list[int], x: Tensor) -> Plan:
        """ids (T, K) global and weights (T, K) travel; `lengths` is the T of every rank.

        x (T, H) is what the layout's `send` will be called with first, and may travel already.
        """


class GatherExchange:
    """Every row to every rank: no split sizes, so static shapes.

    For few ranks, where nearly every token has an expert on each: top-8 of 128 sends 99.7% of its
    rows to both of two ranks and 90% to all of four.
    """

    def __init__(self, group: ProcessGroup, experts: int):
        self.group, self.experts = group, experts

    def plan(self, ids: Tensor, weights: Tensor, lengths: list[int], x: Tensor) -> Plan:
        n, longest = len(lengths), max(lengths)
        wanted = _wanted(ids, self.experts, n)
        first = torch.arange(n, device=ids.device) * longest  # a rank's rows, sent and coming back
        rows = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) + first  # (T, n)
        layout = _Gathered(self.group, n, longest, rows.masked_fill(~wanted, -1))
        routes = layout.send(_padded(_pack(ids, weights), longest, NOWHERE))
        return Plan(*_local(routes, weights.dtype, self.group, self.experts), layout)


@dataclass(frozen=True)
class _Gathered:
    place = None
    group: ProcessGroup
    n: int  # ranks. 2
    longest: int  # rows of each rank, padded. 16384
    positions: Tensor  # (T, n) row of a token's partial in what comes back; -1 for none

    def send(self, x: Tensor) -> Tensor:
        x = _padded(x, self.longest, 0)
        out = x.new_empty(self.n * self.longest, x.shape[1])
        _all_gather(out, x.contiguous(), group=self.group)
        return out

    def collect(self, *arrays: Tensor) -> list[Tensor]:
        return [self._sum(rows.contiguous()) for rows in arrays]

    def _sum(self, rows: Tensor) -> Tensor:
        back = torch.empty_like(rows)
        dist.all_to_all_single(back, rows, group=self.group)
        return fastmoe.sum_rows(back, self.positions)


class RowsExchange:
    """A row only to the ranks that hold one of its experts, by all-to-all with split sizes.

    The host waits for the sizes, once per forward.
    """

    def __init__(self, group: ProcessGroup, experts: int):
        self.group, self.experts = group, experts

    def plan(self, ids: Tensor, weights: Tensor, lengths: list[int], x: Tensor) -> Plan:
        wanted = _wanted(ids, self.experts, dist.get_world_size(self.group))
        sent = torch.stack([wanted.sum(0), _pairs(ids, self.experts, wanted.shape[1])], 1)
        received = _swapped(sent, self.group)
        sent, received = torch.stack([sent, received]).mT.tolist()  # the one wait of a forward
        layout = _rows(self.group, wanted, sent[0], received[0])
        routes = layout.send(_pack(ids, weights))
        local = _local(routes, weights.dtype, self.group, self.experts)
        return Plan(*local, layout, sum(received[1]))


@dataclass(frozen=True)
class _Rows:
    place = None
    group: ProcessGroup
    tokens: Tensor  # (rows sent,) which token each is, rank after rank. [0, 2, 0, 1]
    positions: Tensor  # (T, n) the inverse: where token t's row for rank r is; -1 for none
    sent: list[int]  # rows to each rank. [2, 2]
    received: list[int]  # rows from each rank. [2, 3]

    def send(self, x: Tensor) -> Tensor:
        out = x.new_empty(sum(self.received), *x.shape[1:])
        dist.all_to_all_single(out, x[self.tokens], self.received, self.sent, group=self.group)
        return out

    def collect(self, *arrays: Tensor) -> list[Tensor]:
        return [self._sum(rows.contiguous()) for rows in arrays]

    def _sum(self, rows: Tensor) -> Tensor:
        back = rows.new_empty(sum(self.sent), *rows.shape[1:])
        dist.all_to_all_single(back, rows, self.sent, self.received, group=self.group)
        return fastmoe.sum_rows(back, self.positions)


class NodesExchange:
    """One row per (token, node) between nodes, fanned out inside the node, and back the same way.

    `across` joins the ranks of one place in every node, `inside` the ranks of this node; a row
    goes first to the rank of its own place in the other node.
    """

    def __init__(self, across: ProcessGroup, inside: ProcessGroup, experts: int):
        self.across, self.inside, self.experts = across, inside, experts
        self.nodes, self.places = dist.get_world_size(across), dist.get_world_size(inside)

    def plan(self, ids: Tensor, weights: Tensor, lengths: list[int], x: Tensor) -> Plan:
        dtype, in_node = weights.dtype, self.experts * self.places
        to_node = _wanted(ids, in_node, self.nodes)
        (far, near), slots = self._sizes(ids, to_node)
        across = _rows(self.across, to_node, *far)
        ids, weights = _local(across.send(_pack(ids, weights)), dtype, self.across, in_node)
        inside = _rows(self.inside, _wanted(ids, self.experts, self.places), *near)
        local = _local(inside.send(_pack(ids, weights)), dtype, self.inside, self.experts)
        return Plan(*local, _Nodes(across, inside), slots)

    def _sizes(self, ids: Tensor, to_node: Tensor):
        """((sent, received) across, (sent, received) inside) and the number of slots here.

        What a rank will hand on inside another node, the senders can tell it together with what
        they send, so that the host reads all sizes at once.
        """
        n, m = self.nodes, self.places
        rows = _wanted(ids, self.experts, n * m).sum(0).view(n, m)  # what each rank will get
        pairs = _pairs(ids, self.experts, n * m).view(n, m)
        sent = torch.cat([to_node.sum(0).unsqueeze(1), rows, pairs], 1)  # (n, 1 + 2m)
        received = _swapped(sent, self.across)
        on = received[:, 1:].sum(0).view(2, m).T.contiguous()  # (m, 2) handed on
        here = _swapped(on, self.inside)
        far = torch.stack([sent[:, 0], received[:, 0]]).flatten()
        near = torch.stack([on[:, 0], here[:, 0]]).flatten()
        sizes = torch.cat([far, near, here[:, 1].sum(0, keepdim=True)]).tolist()
        far, near = sizes[: 2 * n], sizes[2 * n : -1]
        return ((far[:n], far[n:]), (near[:m], near[m:])), sizes[-1]


@dataclass(frozen=True)
class _Nodes:
    place = None
    across: Layout
    inside: Layout

    def send(self, x: Tensor) -> Tensor:
        return self.inside.send(self.across.send(x))

    def collect(self, *arrays: Tensor) -> list[Tensor]:
        return self.across.collect(*self.inside.collect(*arrays))


def _wanted(ids: Tensor, experts: int, n: int) -> Tensor:
    """(T, n) bool: whether token t has an expert on rank r. Sentinels are on no rank."""
    owner = (ids // experts).clamp(max=n).long()
    wanted = torch.zeros(ids.shape[0], n + 1, dtype=torch.bool, device=ids.device)
    return wanted.scatter_(1, owner, True)[:, :n]


def _pairs(ids: Tensor, experts: int, n: int) -> Tensor:
    """(n,) how many of the ids are of each rank's experts. Sentinels are of no rank's."""
    owner = (ids // experts).clamp(max=n).long().flatten()
    return owner.new_zeros(n + 1).scatter_add_(0, owner, torch.ones_like(owner))[:n]


def _swapped(sizes: Tensor, group: ProcessGroup) -> Tensor:
    """(n, ...): row r is what rank r has in the row of this rank."""
    received = torch.empty_like(sizes)
    dist.all_to_all_single(received, sizes, group=group)
    return received


def _rows(group: ProcessGroup, wanted: Tensor, sent: list[int], received: list[int]) -> _Rows:
    return _Rows(group, *_rank_major(wanted, sum(sent)), sent, received)


def _rank_major(wanted: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(tokens (total,), positions (T, n)) of the rows to send, rank after rank, tokens in order.

    Example: wanted [[1, 1], [0, 1], [1, 0]] -> tokens [0, 2, 0, 1], positions [[0, 2], [-1, 3],
    [1, -1]].
    """
    flat = wanted.T.flatten()  # (n * T,)
    at = flat.cumsum(0) - 1
    token = torch.arange(wanted.shape[0], device=wanted.device).repeat(wanted.shape[1])
    tokens = token.new_empty(total + 1)  # the last place takes what is not sent
    tokens.scatter_(0, torch.where(flat, at, total), token)
    positions = torch.where(flat, at, -1).view(wanted.shape[1], -1).T
    return tokens[:total], positions


def _pack(ids: Tensor, weights: Tensor) -> Tensor:
    """(T, 2K) integers: the ids, then the bits of the weights, widened to 32 bits or 64."""
    wide = weights.dtype == torch.float64
    bits = weights.double().view(torch.int64) if wide else weights.float().view(torch.int32)
    return torch.cat([ids.to(bits.dtype), bits], 1)


def _unpack(routes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ids, bits = routes.chunk(2, 1)
    weights = bits.contiguous().view(torch.float64 if bits.itemsize == 8 else torch.float32)
    return ids.int(), weights.to(dtype)


def _local(routes: Tensor, dtype, group: ProcessGroup, experts: int) -> tuple[Tensor, Tensor]:
    return _localise(*_unpack(routes, dtype), dist.get_rank(group), experts)


def _localise(ids: Tensor, weights: Tensor, rank: int, experts: int) -> tuple[Tensor, Tensor]:
    """Local ids and their weights; those of another rank's experts: sentinels with weight 0."""
    local = ids - rank * experts
    elsewhere = (local < 0) | (local >= experts)
    return local.masked_fill(elsewhere, experts), weights.masked_fill(elsewhere, 0.0)


def _padded(t: Tensor, rows: int, value: int) -> Tensor:
    """t with `value` in the rows that it is short of."""
    missing = rows - t.shape[0]
    return torch.cat([t, t.new_full((missing, *t.shape[1:]), value)]) if missing else t
