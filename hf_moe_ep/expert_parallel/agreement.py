"""What the ranks of an EP group tell each other on the host before each forward of a layer.

It finds ranks that disagree, or are gone, before a collective on the device could hang. Between
processes of one host a word in shared memory each, a few microseconds; else gloo.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import time
import zlib
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Facts(NamedTuple):
    """One rank's view of one call. All but `tokens` must be equal on every rank."""

    layer: int  # which of the group's experts modules this is, in the order of set-up. 3
    hidden: int  # H. 2048
    top_k: int  # K. 8
    dtype: int  # of the hidden states, an index into _DTYPES. 1
    x_grad: int  # whether the hidden states need a gradient. 1
    weights_grad: int  # whether the routing weights do. 1
    tokens: int  # T; may differ. 16384


def agree(group: ProcessGroup, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> list[int]:
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
    try:
        board = shared_board(group)
        if board is not None and (tokens := board.compare(mine)) is not None:
            return tokens
        return _compare(group, mine)
    except (RuntimeError, TimeoutError) as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} waited in MoE layer {layer} for the other ranks of its "
            f"expert-parallel group {dist.get_process_group_ranks(group)}: "
            f"{str(error).splitlines()[0]}; the cause is in the log of the rank that stopped first"
        ) from error


def _compare(group: ProcessGroup, mine: Facts) -> list[int]:
    """By gloo: the tokens of every rank, or a ValueError that shows who differs."""
    host, row = host_group(group), torch.tensor(mine)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(host))]
    dist.all_gather(rows, row, group=host)
    everyone = [Facts(*r) for r in torch.stack(rows).tolist()]
    ranks = dist.get_process_group_ranks(group)
    for name in Facts._fields[:-1]:  # all but tokens
        values = [getattr(facts, name) for facts in everyone]
        if len(set(values)) > 1:
            shown = [_DTYPES[v] for v in values] if name == "dtype" else values
            table = ", ".join(f"rank {r}: {v}" for r, v in zip(ranks, shown, strict=True))
            raise ValueError(
                f"the ranks of an expert-parallel group disagree on {name} ({table}); all ranks "
                "must run the same layers, on inputs of one dtype, with and without gradients alike"
            )
    return [facts.tokens for facts in everyone]


@cache
def host_group(group: ProcessGroup) -> ProcessGroup:
    """The group itself where it is gloo's, else a gloo group of the same ranks. Collective."""
    if dist.get_backend(group) == "gloo":
        return group
    return dist.new_group(
        dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True
    )


class Board:
    """A word for every rank in memory that the processes of a host share.

    A word holds the number of the call, a checksum of the facts that must be equal, and T. There
    are two sets in turn: who writes to a set again has seen all ranks write to the other, so all
    have read the first.
    """

    def __init__(self, path: Path, pids: list[int], ranks: list[int], me: int, timeout: timedelta):
        with path.open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.pids, self.ranks, self.me, self.timeout = pids, ranks, me, timeout.total_seconds()
        self.calls = 0

    def compare(self, mine: Facts) -> list[int] | None:
        """The tokens of every rank; None, on all ranks, where the other facts differ.

        Raises TimeoutError with the name of a rank that is gone or does not come.
        """
        self.calls += 1
        call, first = self.calls & 0xFFFF, self.calls % 2 * len(self.pids)
        check = zlib.crc32(repr(mine[:-1]).encode()) & 0xFFFF
        self.words[first + self.me] = call << 48 | check << 32 | mine.tokens
        words = [self._wait(first + i, i, call) for i in range(len(self.pids))]
        if any(word >> 32 & 0xFFFF != check for word in words):
            return None
        return [word & 0xFFFFFFFF for word in words]

    def _wait(self, at: int, who: int, call: int) -> int:
        for _ in range(200):
            if (word := self.words[at]) >> 48 == call:
                return word
        started = time.monotonic()
        while (word := self.words[at]) >> 48 != call:
            waited = time.monotonic() - started
            if waited > 1 and not _alive(self.pids[who]):
                raise TimeoutError(f"the process of rank {self.ranks[who]} is gone")
            if waited > self.timeout:
                raise TimeoutError(f"rank {self.ranks[who]} did not come within {self.timeout} s")
            time.sleep(0 if waited < 0.01 else 1e-3)
        return word


@cache
def shared_board(group: ProcessGroup) -> Board | None:
    """The group's board, None where its processes share no memory. Collective, the first time."""
    host = host_group(group)
    n, me = dist.get_world_size(host), dist.get_rank(host)
    path = None
    if me == 0:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(bytes(2 * n * 8))
            path = file.name
    everyone = gathered((socket.gethostname(), os.getpid(), path), host)
    path = Path(everyone[0][2])
    shared = len({name for name, _, _ in everyone}) == 1 and path.exists()
    board = None
    if all(gathered(shared, host)):
        ranks = dist.get_process_group_ranks(group)
        board = Board(path, [pid for _, pid, _ in everyone], ranks, me, timeout_of(host, "cpu"))
    dist.barrier(group=host)
    if me == 0:
        path.unlink()
    return board


def gathered(value: Any, group: ProcessGroup) -> list:
    """The value of every rank of the group, in rank order."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def timeout_of(group: ProcessGroup, device_type: str) -> timedelta:
    return group._get_backend(torch.device(device_type)).options._timeout


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
