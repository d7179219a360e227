"""What the reproductions share: a tiny Qwen3-MoE, and a function run on gloo ranks of this machine.

The plug-in is not imported here, nor in any rank: what runs is the released libraries alone.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

PRELOAD = [
    "transformers.trainer",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "trl.scripts.sft",
]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def run(world: int, function, *args, timeout: float = 180) -> None:
    """Runs `function(*args)` on `world` gloo ranks, forked from a server with the libraries loaded.

    Raises AssertionError with the last line of a rank's traceback, or "hangs" after `timeout`
    seconds; every rank is killed by then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(r, world, port, pipes[r][1], function, args))
        for r in range(world)
    ]
    for process, (_, send) in zip(ranks, pipes, strict=True):
        process.start()
        send.close()  # so that a rank that dies is noticed at once
    waiting, deadline = [receive for receive, _ in pipes], time.monotonic() + timeout
    try:
        while waiting:
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"{function.__name__} hangs: no result within {timeout} s"
            for pipe in ready:
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "a rank died"
                assert not error, error
                waiting.remove(pipe)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(rank: int, world: int, port: int, pipe, function, args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=180))
        function(*args)
        if world > 1:
            dist.barrier()  # nobody leaves while another still needs the connection
        pipe.send("")
    except BaseException as error:
        traceback.print_exc()
        pipe.send(f"rank {rank}: {type(error).__name__}: {error}")


def tiny_model(seed: int = 0, **sizes):
    """A Qwen3-MoE of two layers and four experts in fp32, the same on every rank."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | sizes))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def sharded(model, **kwargs):
    """`model` as `from_pretrained(**kwargs)` loads it; every rank has the same `model`."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)  # rank 0 alone writes
        model.save_pretrained(folders[0])
        dist.barrier()
        loaded = type(model).from_pretrained(folders[0], **kwargs)
        dist.barrier()
    return loaded


def tokens(rows: int, length: int = 12):
    """Token ids (rows, length), the same on every rank."""
    import torch

    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator())


def full(tensor):
    """The whole of a DTensor, a plain tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
