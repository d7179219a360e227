"""Runs a function on several ranks of this machine and gives back what each returned.

Ranks are forked from a server process that has imported the libraries once, so a launch takes a
fraction of a second. gloo on CPUs; NCCL, a GPU a rank, where `backend="nccl"` is asked for.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

mp.set_forkserver_preload(["tests.distributed.ranks", "tests.distributed.preload"])


def run_ranks(
    world: int, function: Callable, *args, timeout: float = 120, backend: str = "gloo"
) -> list:
    """[function(*args) of rank 0, of rank 1, ...], run under an initialised process group.

    `function` is a module-level function; it and `args` are pickled. Raises what a rank raised,
    with its traceback (mp.ProcessRaisedException), and TimeoutError after `timeout` seconds, in
    both cases with every rank killed. `timeout` is the process group's as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (function, args, folder, world, _free_port(), timeout, backend)
        context = mp.start_processes(
            _rank, job, nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: no result within {timeout} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / str(r), weights_only=False) for r in range(world)]


def _rank(rank: int, function, args, folder: str, world: int, port: int, timeout, backend) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        hide_gpus()
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    result = function(*args)
    torch.save(result, Path(folder) / str(rank))
    dist.barrier()  # nobody leaves while another still needs the connection
    dist.destroy_process_group()


def hide_gpus() -> None:
    """Before this process looks for any: gloo's ranks compute on the CPU on every machine."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
