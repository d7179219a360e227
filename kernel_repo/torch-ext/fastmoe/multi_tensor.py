"""One launch over many tensors: a table of their addresses, and which part of which tensor each
program works on.
"""

from __future__ import annotations

from functools import lru_cache

import torch


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether programs may read it 16 bytes at a time, from its address to its end."""
    return not (tensor.nbytes | tensor.data_ptr()) % 16


def table(rows: list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """`rows` as int64 on the device, without waiting for it."""
    # Pinned: from other memory the copy would wait for the device.
    on_host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


@lru_cache(32)
def places(sizes: tuple[int, ...], part: int, device: torch.device) -> torch.Tensor:
    """(programs, 2) int32: tensor, and which `part` of its size.

    Two tensors of 3 and 1 parts: 0 0, 0 1, 0 2, 1 0.
    """
    parts = torch.tensor([-(-size // part) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(parts)
    starts = parts.cumsum(0) - parts
    within = torch.arange(int(parts.sum())) - starts[tensor]
    return torch.stack([tensor, within], 1).to(torch.int32).to(device)


@lru_cache(32)
def on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`numbers` as int32 on the device; the same few lists come in every step."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)
