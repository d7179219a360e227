"""What a training run spends beside its steps: the check for values that are not finite, in every
step, and saving checkpoints, at once and in the background.

    torchrun --nproc-per-node 2 -m benchmarks.bench_upkeep    # or 1

Qwen3-30B-A3B's layers, sharded by FSDP2 and EP over all ranks, bf16, AdamW. Steps with and without
the check take turns; the slowest rank's times count. A step is forward, backward, clipping and the
optimizer of `micro_batches` sequences a rank. Saving: how long training stands still, how much
longer its steps take while the files are written, and how long until the checkpoint is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig

from hf_moe_ep import DistributedConfig
from hf_moe_ep.training import (
    CheckpointSaver,
    FiniteCheck,
    clip_grad_norm_,
    param_groups,
    save_checkpoint,
)

from .bench_plan import Point, make_model
from .bench_sequence import QWEN3_30B_A3B, TINY, loss_of, sequence
from .environment import describe, device_slug, torchrun
from .ranks import join, save, slowest
from .timing import spread, synchronize

VOCABULARY = 32768  # of the model that is saved: its layers are what takes the memory


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    device = join()
    ranks = dist.get_world_size()
    result = {
        "benchmark": "upkeep",
        "mode": "upkeep",
        "ranks": ranks,
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "rows": [],
        "environment": describe(device, torchrun("bench_upkeep", argv), args.commit),
    }
    path = args.out / f"upkeep{ranks}-{device_slug(device)}.json"

    def add(row: dict) -> None:
        result["rows"].append(row)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
        save(result, path)

    measure_check(args, device, add)
    measure_saves(args, device, add)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench_upkeep", allow_abbrev=False, description=__doc__)
    parser.add_argument("--layers", type=int, default=8 if on_gpu else 2)
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 64)
    parser.add_argument("--micro_batches", default="1,4", help="sequences of a step, by commas")
    parser.add_argument("--rounds", type=int, default=4, help="steps of either kind, timed")
    parser.add_argument("--save_layers", type=int, default=2 if on_gpu else 1)
    parser.add_argument("--save_to", type=Path, help="where; default: the temporary folder")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    return parser


class Run:
    """A model, its optimizer and this rank's sequence."""

    def __init__(self, args: argparse.Namespace, layers: int, device: torch.device, **sizes):
        on_gpu, ranks = device.type == "cuda", dist.get_world_size()
        known, dtype = (QWEN3_30B_A3B, torch.bfloat16) if on_gpu else (TINY, torch.float32)
        config = Qwen3MoeConfig(
            num_hidden_layers=layers, architectures=["Qwen3MoeForCausalLM"], **known | sizes
        )
        layout = {"fsdp_size": ranks, "ep_size": ranks} if ranks > 1 else {}
        layout = DistributedConfig.for_model(config, **layout)
        point = Point({}, args.tokens, checkpointing=True)
        self.device = device
        self.model = make_model(config, layout, point, "sdpa", dtype, device)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, lr=1e-5), fused=on_gpu)
        self.ids = sequence(args.tokens, device, seed=dist.get_rank())

    def step(self, micro_batches: int = 1, check: FiniteCheck | None = None) -> Tensor:
        """One optimizer step; the last loss."""
        for index in range(micro_batches):
            if hasattr(self.model, "set_requires_gradient_sync"):
                self.model.set_requires_gradient_sync(index == micro_batches - 1)
            loss = loss_of(self.model, self.ids) / micro_batches
            loss.backward()
        if check:
            check.gradients()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if check:
            check.values()
        self.optimizer.zero_grad()
        return loss.detach()

    def bytes(self) -> int:
        """Of this rank's weights and optimizer state."""
        return _bytes(self.tensors())

    def tensors(self) -> list[Tensor]:
        """Weights and optimizer state."""
        states = [s.values() for s in self.optimizer.state.values()]
        states = [v for values in states for v in values if torch.is_tensor(v)]
        return [*self.model.parameters(), *states]

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Wall time of the slowest rank, all starting together."""
        dist.barrier()
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return slowest([1e3 * (time.perf_counter() - start)], self.device)[0]


def measure_check(args: argparse.Namespace, device: torch.device, add: Callable) -> None:
    run = Run(args, args.layers, device)
    # Waits for the device once in ten steps, as in training; the timing waits in every step anyway.
    check = FiniteCheck(run.model, run.optimizer, every=10)
    for micro_batches in map(int, args.micro_batches.split(",")):
        calls = {
            "step": partial(run.step, micro_batches),
            "with_check": partial(run.step, micro_batches, check),
        }
        times = {name: [] for name in calls}
        for index in range(args.rounds + 2):
            for name, call in calls.items():
                ms = run.milliseconds(call)
                if index >= 2:  # the first rounds compile and warm up
                    times[name].append(ms)
        plain = statistics.median(times["step"])
        alone, norms = check_alone(run, args.rounds)
        add(
            {
                "what": "finite check",
                "layers": args.layers,
                "T": args.tokens,
                "micro_batches": micro_batches,
                **{name: asdict(spread(ms)) for name, ms in times.items()},
                "check_ms": alone,
                "norms_ms": norms,
                "check_gbs": 1e-6 * (run.bytes() + _bytes(run.model.parameters())) / alone,
                "share": alone / plain,
                "share_by_steps": statistics.median(times["with_check"]) / plain - 1,
            }
        )
    check.raise_if_found()
    del calls, call, check
    _forget(run)


def check_alone(run: Run, rounds: int) -> tuple[float, float]:
    """Milliseconds of both checks of a step, over all gradients, states and values; and of torch's
    own way to read the same, a multi-tensor norm per dtype.
    """
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    check = FiniteCheck(run.model, run.optimizer, every=10**9)
    by_dtype = defaultdict(list)
    for tensor in run.tensors() + [p.grad for p in run.model.parameters()]:
        if tensor.numel() > 1:  # AdamW's steps
            by_dtype[tensor.dtype].append(_local(tensor.detach()))

    def both() -> None:
        check.gradients()
        check.values()

    def norms() -> None:
        for tensors in by_dtype.values():
            torch._foreach_norm(tensors, math.inf)

    times = [[run.milliseconds(call) for call in (both, norms)] for _ in range(rounds + 2)]
    run.optimizer.zero_grad()
    ours, torchs = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return ours, torchs


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = [_local(t) for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def measure_saves(args: argparse.Namespace, device: torch.device, add: Callable) -> None:
    run = Run(
        args, args.save_layers, device, vocab_size=VOCABULARY if device.type == "cuda" else 64
    )
    run.ids = run.ids % run.model.config.vocab_size
    for _ in range(3):
        run.step()
    before = statistics.median([run.milliseconds(run.step) for _ in range(5)])
    total = torch.tensor(float(run.bytes()), device=device)
    dist.all_reduce(total)
    folders = [tempfile.mkdtemp(dir=args.save_to)]
    dist.broadcast_object_list(folders)  # rank 0's
    try:
        for asynchronous in (False, True):
            row = save_once(run, Path(folders[0]) / f"checkpoint-{int(asynchronous)}", asynchronous)
            lost = row["stall_ms"] + sum(max(0.0, ms - before) for ms in row["steps_meanwhile_ms"])
            gib = total.item() / 2**30
            row = {"what": "save", "gib": gib, "step_ms": before, **row, "training_lost_ms": lost}
            add({"asynchronous": asynchronous, **row})
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folders[0])
    _forget(run)


def save_once(run: Run, folder: Path, asynchronous: bool) -> dict:
    """How long the call took, the steps until the checkpoint was there, and when it was."""
    saver, steps = CheckpointSaver(asynchronous), []
    start = time.perf_counter()
    stall = run.milliseconds(lambda: save_checkpoint(folder, run.model, run.optimizer, saver=saver))
    there = torch.zeros(1, device=run.device)
    while not there.item():  # rank 0 looks, all go on alike
        if asynchronous:
            steps.append(run.milliseconds(run.step))
        there.fill_(float(folder.exists()))
        dist.broadcast(there, 0)
    saver.wait()
    done = slowest([1e3 * (time.perf_counter() - start)], run.device)[0]
    return {"stall_ms": stall, "steps_meanwhile_ms": steps, "there_after_ms": done}


def _forget(run: Run) -> None:
    del run.model, run.optimizer
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
