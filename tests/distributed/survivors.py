"""Runs ranks of which some die, and tells what became of each."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.ranks import _free_port, hide_gpus


def outcomes(world: int, function, *args, within: float, timeout: float = 20) -> list:
    """What became of every rank: what `function(*args)` returned, the exception it raised as text,
    an exit code, negative for a signal, or None where it still ran after `within` seconds and was
    killed. `timeout` seconds are the process group's.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (function, args, folder, world, _free_port(), timeout)
        context = mp.start_processes(
            _rank, job, nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + within
        try:
            for process in context.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in context.processes]
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        ends = [Path(folder) / str(rank) for rank in range(world)]
        return [
            torch.load(end) if end.exists() else code for end, code in zip(ends, codes, strict=True)
        ]


def _rank(rank: int, function, args, folder: str, world: int, port: int, timeout: float) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    hide_gpus()
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        result = function(*args)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / str(rank))
    os._exit(0)  # as a process that ends: its connections close, nobody waits for others
