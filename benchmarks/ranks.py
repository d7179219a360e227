"""What the benchmarks of several ranks share: joining the process group of a torchrun, one figure
for all ranks, and one file.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from . import report


def join() -> torch.device:
    """Joins the process group; this rank's device: a GPU each where there are any, over NCCL."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return device


def slowest(times: list[float], device: torch.device) -> list[float]:
    """The largest of all ranks' values, one by one."""
    every = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return every.tolist()


def save(result: dict, path: Path) -> None:
    """The first rank writes the result."""
    if dist.get_rank() == 0:
        report.save(result, path)
