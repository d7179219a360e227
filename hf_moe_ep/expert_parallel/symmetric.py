"""Rows over NVLink: every rank publishes in memory that its peers read, and pulls what it needs.

Nothing is split by size: because a token is published once, ranks x T rows is the exact worst case,
so there is no capacity to guess and no dropped token, and a forward captures into a CUDA graph.
Shapes: n ranks, T the most tokens of any, R = n*T rows, H hidden, K experts a token. Uses
torch.distributed's symmetric memory without multicast.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernel import get_kernel
from .exchange import NOWHERE, Count, Received, _pack, _padded

fastmoe = get_kernel()
_ALIGNMENT = 256  # bytes, of what is published together
logger = logging.getLogger(__name__)


class SymmetricExchange:
    """A row is pulled by the ranks that hold one of its experts, straight from its rank's memory.

    The experts' partial sums come back the same way: the token's rank pulls them and adds them up.
    """

    def __init__(self, group: ProcessGroup, experts: int):
        self.group, self.experts = group, experts

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor, lengths: list[int]) -> Received:
        memory, tokens = shared_memory(self.group, x.device), max(lengths)
        routes = _padded(_pack(ids, weights.float()), tokens, NOWHERE)
        rows_at, routes_at = memory.publish(x, routes, rows=tokens)
        local, pulled = fastmoe.exchange.pull_routes(
            memory.peers, routes_at, tokens, ids.shape[1], memory.rank * self.experts, self.experts
        )
        count = Count(local < self.experts)
        rows = fastmoe.exchange.pull_rows(
            memory.peers, rows_at, local, x.shape[1], self.experts, x.dtype
        )
        memory.barrier()
        layout = _Pulled(memory, ids.int(), local, tokens, self.experts)
        return Received(rows, local, pulled.to(weights.dtype), layout, count.value())


@dataclass(frozen=True)
class _Pulled:
    memory: SharedMemory
    ids: Tensor  # (T, K) int32 global ids of this rank's tokens
    local: Tensor  # (R, K) int32 local ids of the rows here
    tokens: int  # rows of each rank, padded. 16384
    experts: int  # experts of each rank. 64

    def send(self, x: Tensor) -> Tensor:
        memory = self.memory
        (first_byte,) = memory.publish(x, rows=self.tokens)
        rows = fastmoe.exchange.pull_rows(
            memory.peers, first_byte, self.local, x.shape[1], self.experts, x.dtype
        )
        memory.barrier()
        return rows

    def collect(self, rows: Tensor) -> Tensor:
        memory = self.memory
        (first_byte,) = memory.publish(rows, rows=rows.shape[0])
        out = fastmoe.exchange.pull_sums(
            memory.peers, first_byte, self.ids, self.tokens, memory.rank,
            rows.shape[1], self.experts, rows.dtype,
        )  # fmt: skip
        memory.barrier()
        return out


class SharedMemory:
    """One buffer on every rank of a group that all of them read; grows when a batch needs more.

    Between `publish` and the `barrier` that ends its use nobody writes to it.
    """

    def __init__(self, group: ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank = dist.get_rank(group)
        self.timeout_ms = int(_timeout_s(group) * 1000)
        self.outgrown: list[Tensor] = []  # CUDA graphs captured before may still read these
        self._allocate(1 << 20)

    def _allocate(self, size: int) -> None:
        self.buffer = symm_mem.empty(size, dtype=torch.uint8, device=self.device)
        self.handle = symm_mem.rendezvous(self.buffer, self.group)
        self.peers = torch.tensor(self.handle.buffer_ptrs, dtype=torch.int64, device=self.device)

    def publish(self, *arrays: Tensor, rows: int) -> list[int]:
        """Copies arrays (<= rows, W) into this rank's buffer; the byte where each begins.

        All ranks pass arrays of the same widths and dtypes and the same `rows`, so the places are
        the same everywhere, and a buffer that is too small grows on all of them. Returns when every
        rank's copies are ordered before what this rank launches next.

        Raises:
            ValueError: it would have to grow while a CUDA graph is being captured.
        """
        firsts, size = [], 0
        for array in arrays:
            firsts.append(size)
            size += -(-rows * array.shape[1] * array.itemsize // _ALIGNMENT) * _ALIGNMENT
        if size > self.buffer.numel():
            self._grow(size)
        for first, array in zip(firsts, arrays, strict=True):
            place = self.buffer[first : first + array.nbytes]
            place.view(array.dtype).view(array.shape).copy_(array)
        self.barrier()
        return firsts

    def barrier(self) -> None:
        """Orders all ranks' launches before it ahead of all ranks' launches after it."""
        self.handle.barrier(timeout_ms=self.timeout_ms)

    def _grow(self, size: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{size >> 20} MiB of shared memory are needed, {self.buffer.numel() >> 20} MiB "
                "exist, and none can be made while a CUDA graph is captured; run one step of this "
                "size before the capture"
            )
        self.outgrown.append(self.buffer)
        self._allocate(1 << (size - 1).bit_length())


@cache
def shared_memory(group: ProcessGroup, device: torch.device) -> SharedMemory:
    """The group's buffer; a collective call the first time."""
    return SharedMemory(group, device)


def reachable(group: ProcessGroup) -> bool:
    """Whether every GPU of the group can read every other's memory. A collective call.

    GPUs of one host, each with peer access to the others. All ranks get the same answer.
    """
    if not torch.cuda.is_available() or dist.get_backend(group) != "nccl":
        return False
    mine = (socket.gethostname(), torch.cuda.current_device())
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if len({host for host, _ in everyone}) > 1:
        return False
    devices = [device for _, device in everyone if device != mine[1]]
    can = all(torch.cuda.can_device_access_peer(mine[1], device) for device in devices)
    answers = [None] * len(everyone)
    dist.all_gather_object(answers, can, group=group)
    return all(answers)


def _timeout_s(group: ProcessGroup) -> float:
    options = group._get_backend(torch.device("cuda")).options
    return options._timeout.total_seconds()
