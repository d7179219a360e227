"""Rows over NVLink: every rank publishes in memory that its peers read, and pulls what it needs.

Nothing is split by size: because a token is published once, ranks x T rows is the exact worst case,
so there is no capacity to guess and no dropped token, and a forward captures into a CUDA graph.
Shapes: n ranks, T the most tokens of any, R = n*T rows, H hidden, K experts a token. Uses
torch.distributed's symmetric memory without multicast.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernel import get_kernel
from .agreement import gathered, timeout_of
from .exchange import Plan

fastmoe = get_kernel()

_ALIGNMENT = 256  # bytes, of arrays that are published together
_CHUNK = 1 << 21  # bytes; buffers are so many, times a whole number


class SymmetricExchange:
    """A row is pulled by the ranks that hold one of its experts, straight from its rank's memory.

    The experts' partial sums come back the same way: the token's rank pulls them and adds them up.
    """

    def __init__(self, group: ProcessGroup, experts: int):
        self.group, self.experts = group, experts

    def plan(self, ids: Tensor, weights: Tensor, lengths: list[int], x: Tensor) -> Plan:
        memory, tokens = shared_memory(self.group, ids.device), max(lengths)
        place = memory.place("routes", tokens * ids.shape[1] * 8)
        fastmoe.exchange.write_routes(place, ids, weights, tokens)
        _publish(memory, x, tokens)  # with the routes, behind one barrier
        routes, rows = memory.open("routes", "tokens")
        local, here = fastmoe.exchange.pull_routes(
            routes, tokens, ids.shape[1], memory.rank * self.experts, self.experts, weights.dtype
        )
        return Plan(local, here, _Pulled(memory, ids, local, tokens, self.experts, [rows]))


def _publish(memory: SharedMemory, x: Tensor, tokens: int) -> None:
    place = memory.place("tokens", tokens * x.shape[1] * x.itemsize)
    place[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)


@dataclass(frozen=True)
class _Pulled:
    memory: SharedMemory
    ids: Tensor  # (T, K) global ids of this rank's tokens
    local: Tensor  # (R, K) int32 local ids of the rows here
    tokens: int  # rows of each rank, padded. 16384
    experts: int  # experts of each rank. 64
    ready: list[Tensor]  # the addresses of the first rows to be sent: published with the routes

    def send(self, x: Tensor) -> Tensor:
        if not self.ready:
            _publish(self.memory, x, self.tokens)
            self.ready.extend(self.memory.open("tokens"))
        peers = self.ready.pop()
        return fastmoe.exchange.pull_rows(peers, self.local, x.shape[1], self.experts, x.dtype)

    def place(self, width: int, dtype: torch.dtype) -> Tensor:
        """Shared memory, so that a sum that is written here need not be copied to be published.

        It holds until anything is published as "partials" next.
        """
        (rows, top_k), nbytes = self.local.shape, self.local.shape[0] * width * dtype.itemsize
        place = self.memory.place("partials", _aligned(nbytes) + _aligned(rows * top_k * 8), self)
        return place[:nbytes].view(dtype).view(rows, width).detach()  # no view, for autograd

    def collect(self, *arrays: Tensor) -> list[Tensor]:
        firsts, size = [], 0
        for array in arrays:
            firsts.append(size)
            size += _aligned(array.nbytes)
        if self.memory.holds("partials", arrays[0], self):
            place, ready = self.memory.regions["partials"].buffer, 1
        else:
            place, ready = self.memory.place("partials", size), 0
        for first, array in list(zip(firsts, arrays, strict=True))[ready:]:
            part = place[first : first + array.nbytes]
            part.view(array.dtype).view(array.shape).copy_(array)
        (peers,) = self.memory.open("partials")
        published = [(f, a.shape[1], a.dtype) for f, a in zip(firsts, arrays, strict=True)]
        return fastmoe.exchange.pull_sums(
            peers, published, self.ids, self.tokens, self.memory.rank, self.experts
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass
class _Region:
    """A buffer of every rank that all read."""

    buffer: Tensor  # (bytes,) uint8, this rank's
    handle: object  # torch's symmetric memory handle
    peers: Tensor  # (n,) int64 addresses of all ranks' buffers
    opened: int = -1  # which barrier let the peers read it last
    owner: object = None  # who placed it last, if they said so


class SharedMemory:
    """Buffers by name on every rank of a group, which grow when a batch needs more.

    All ranks call `place` and `open` in the same order with the same sizes. `place` gives a buffer
    that no peer reads any more: so it is once any barrier has followed the one that opened it.
    """

    def __init__(self, group: ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank = dist.get_rank(group)
        self.timeout_ms = int(timeout_of(group, "cuda").total_seconds() * 1000)
        self.regions: dict[str, _Region] = {}
        self.barriers = 0
        self.captured = False  # replays run between barriers that this count does not see
        self.outgrown: list[_Region] = []

    def place(self, name: str, size: int, owner: object = None) -> Tensor:
        """(size,) bytes of this rank's buffer `name`, to be written; `owner` for `holds`.

        Raises:
            ValueError: it would have to grow while a CUDA graph is being captured.
        """
        capturing = torch.cuda.is_current_stream_capturing()
        self.captured |= capturing
        region = self.regions.get(name)
        if region is None or region.buffer.numel() < size:
            region = self._grow(name, size, capturing)
        elif self.captured or region.opened == self.barriers:
            self._barrier(region)
        region.owner = owner
        return region.buffer[:size]

    def holds(self, name: str, array: Tensor, owner: object) -> bool:
        """Whether `array` is what `owner` had placed at the start of buffer `name`.

        Raises:
            RuntimeError: it is, but somebody else has placed something there since.
        """
        region = self.regions.get(name)
        if region is None or array.data_ptr() != region.buffer.data_ptr():
            return False
        if region.owner is not owner:
            raise RuntimeError(
                "partial sums of an experts layer were overwritten by another layer's before they "
                "were sent; run experts layers one after the other, also in backward"
            )
        return True

    def open(self, *names: str) -> list[Tensor]:
        """(n,) int64 each: where every rank's buffer is, once all have written theirs."""
        regions = [self.regions[name] for name in names]
        self._barrier(regions[0])
        for region in regions:
            region.opened = self.barriers
        return [region.peers for region in regions]

    def _barrier(self, region: _Region) -> None:
        """Orders all ranks' launches before it ahead of all ranks' launches after it."""
        self.barriers += 1
        region.handle.barrier(timeout_ms=self.timeout_ms)

    def _grow(self, name: str, size: int, capturing: bool) -> _Region:
        if capturing:
            raise ValueError(
                f"expert parallelism needs {size >> 20} MiB of shared memory for this batch, and "
                "none can be made while a CUDA graph is captured; run one step of this size first"
            )
        old = self.regions.pop(name, None)
        if old is not None and self.captured:
            self.outgrown.append(old)  # a captured graph may still use it
        torch.cuda.synchronize(self.device)  # nobody reads the old one after the rendezvous
        size = -(-size * 5 // 4 // _CHUNK) * _CHUNK + _CHUNK
        buffer = symm_mem.empty(size, dtype=torch.uint8, device=self.device)
        handle = symm_mem.rendezvous(buffer, self.group)
        peers = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=self.device)
        self.regions[name] = _Region(buffer, handle, peers)
        return self.regions[name]


@cache
def shared_memory(group: ProcessGroup, device: torch.device) -> SharedMemory:
    return SharedMemory(group, device)


@cache
def reachable(group: ProcessGroup) -> bool:
    """Whether every GPU of the group can read every other's memory. Collective, the first time.

    GPUs of one host, each with peer access to the others. All ranks get the same answer.
    """
    if not torch.cuda.is_available() or dist.get_backend(group) != "nccl":
        return False
    mine = (socket.gethostname(), torch.cuda.current_device())
    everyone = gathered(mine, group)
    if len({host for host, _ in everyone}) > 1:
        return False
    devices = [device for _, device in everyone if device != mine[1]]
    can = all(torch.cuda.can_device_access_peer(mine[1], device) for device in devices)
    return all(gathered(can, group))
