"""The NVLink exchange between processes of one host without GPUs: files that all ranks map stand
for memory that peers read. With Triton's interpreter its kernels then run as they are.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hf_moe_ep.expert_parallel import implementation, symmetric


class HostMemory(symmetric.SharedMemory):
    """The same buffers and the same order of barriers; all ranks of the default group."""

    def __init__(self, folder: Path):
        self.folder, self.rank, self.ranks = folder, dist.get_rank(), dist.get_world_size()
        self.regions, self.barriers, self.captured = {}, 0, False

    def _barrier(self, region) -> None:
        self.barriers += 1
        dist.barrier()

    def _grow(self, name: str, size: int, capturing: bool):
        dist.barrier()  # nobody reads the old one after it
        paths = [self.folder / f"{name}-{size}-{rank}" for rank in range(self.ranks)]
        paths[self.rank].write_bytes(os.urandom(size))
        dist.barrier()
        buffers = [torch.from_numpy(np.memmap(path, np.uint8, "r+")) for path in paths]
        peers = torch.tensor([buffer.data_ptr() for buffer in buffers])
        self.regions[name] = symmetric._Region(buffers[self.rank], buffers, peers)
        return self.regions[name]


def use_host_memory(folder: Path) -> HostMemory:
    """From here on this process's exchanges go through files in `folder`."""
    memory = HostMemory(folder)
    symmetric.shared_memory = lambda group, device: memory
    implementation.reachable = lambda group: True
    torch.cuda.is_current_stream_capturing = lambda: False
    return memory
