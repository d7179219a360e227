"""Whole training steps of Qwen3-30B-A3B, measured beside what `hf-moe-ep plan` says of them: peak
memory of the fullest rank, and step time, tokens/s and MFU.

    torchrun --nproc-per-node 2 -m benchmarks.bench_plan                 # six layouts, 8 layers
    torchrun --nproc-per-node 2 -m benchmarks.bench_plan --layers 48 --points ep,ep_sp

Random weights are made on the device. A step is Trainer's: micro-batches of one sequence, TRL's
loss, clipping, fused AdamW; weights, gradients and states in bfloat16. On CPUs: tiny sizes, and no
memory. Exit status 1 where memory is more than 10% from the plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3MoeConfig

from hf_moe_ep import DistributedConfig, plans
from hf_moe_ep.plans.memory import ModelSizes, held_parameters, memory
from hf_moe_ep.plans.speed import Rates, speed
from hf_moe_ep.sequence_parallel import enable_sequence_parallel
from hf_moe_ep.training import clip_grad_norm_, count_flops, param_groups, peak_tflops

from .bench_sequence import QWEN3_30B_A3B, TINY, loss_of, sequence
from .environment import describe, device_slug, torchrun
from .random_model import random_model
from .ranks import join, save, slowest
from .timing import synchronize

GIB = 2**30


@dataclass(frozen=True)
class Point:
    layout: dict  # arguments of DistributedConfig.for_model
    tokens: int  # of a sequence, on a GPU; divided by 64 on CPUs
    checkpointing: bool
    micro_batches: int = 1


def points(ranks: int) -> dict[str, Point]:
    """What is measured on so many ranks, by name."""
    fsdp, ep = {"fsdp_size": ranks}, {"fsdp_size": ranks, "ep_size": ranks}
    if ranks == 1:
        return {
            "plain": Point({}, 4096, False),
            "long": Point({}, 16384, False),
            "checkpointing": Point({}, 16384, True),
            "accumulation": Point({}, 8192, False, 2),
        }
    return {
        "fsdp": Point(fsdp, 8192, False),
        "ep": Point(ep, 8192, False),
        "ep_checkpointing": Point(ep, 32768, True),
        "ep_accumulation": Point(ep, 8192, False, 2),
        "ep_sp": Point(ep | {"sp_size": ranks}, 32768, True),
        "ep_tp_sp": Point(
            {"tp_size": ranks, "ep_size": ranks, "enable_sequence_parallel": True}, 16384, False
        ),
    }


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    device = join()
    on_gpu = device.type == "cuda"
    ranks = dist.get_world_size()
    chosen = points(ranks)
    chosen = {name: chosen[name] for name in (args.points or ",".join(chosen)).split(",")}
    result = {
        "benchmark": "plan",
        "mode": "plan",
        "ranks": ranks,
        "layers": args.layers,
        "dtype": "bfloat16" if on_gpu else "float32",
        "rows": [],
        "environment": describe(device, torchrun("bench_plan", argv), args.commit),
    }
    path = args.out / f"plan{ranks}-{args.layers}layers-{device_slug(device)}.json"
    for name, point in chosen.items():
        result["rows"].append({"name": name} | measure(point, args, device))
        if dist.get_rank() == 0:
            print(json.dumps(result["rows"][-1]), flush=True)
        save(result, path)
    dist.barrier()
    dist.destroy_process_group()
    ratios = [row["peak_over_plan"] for row in result["rows"] if row["peak_over_plan"]]
    return int(any(not 0.9 <= ratio <= 1.1 for ratio in ratios))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_plan", allow_abbrev=False, description=__doc__)
    parser.add_argument("--points", help="names, by commas; default: all for this many ranks")
    parser.add_argument("--layers", type=int, default=8 if torch.cuda.is_available() else 2)
    parser.add_argument("--steps", type=int, default=5, help="timed, after two to warm up")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    return parser


def measure(point: Point, args: argparse.Namespace, device: torch.device) -> dict:
    """One row: the plan and what was measured, of one point."""
    on_gpu = device.type == "cuda"
    sizes, dtype = (QWEN3_30B_A3B, torch.bfloat16) if on_gpu else (TINY, torch.float32)
    tokens = point.tokens if on_gpu else point.tokens // 64
    config = Qwen3MoeConfig(
        num_hidden_layers=args.layers, architectures=["Qwen3MoeForCausalLM"], **sizes
    )
    layout = DistributedConfig.for_model(config, **point.layout)
    groups = layout.world_size // (layout.sp_size * layout.tp_size)
    row = {"T": tokens, **asdict(point), "micro_batches": point.micro_batches}
    row |= planned(config, layout, point, tokens)
    model = make_model(config, layout, point, args.attention, dtype, device)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5), fused=on_gpu)
    # Ranks that share a sequence get the same one.
    group = dist.get_rank() // (layout.sp_size * layout.tp_size)
    ids = sequence(tokens, device, seed=group)
    times = []
    for index in range(args.steps + 2):
        if index == 2 and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        loss = train_step(model, optimizer, ids, point.micro_batches)
        synchronize(device)
        times.append(time.perf_counter() - start)
    if not torch.isfinite(loss):
        raise ValueError(f"{point}: the loss is {loss.item()}")
    seconds = slowest([sorted(times[2:])[len(times[2:]) // 2]], device)[0]
    peak = slowest([torch.cuda.max_memory_allocated(device) / GIB], device)[0] if on_gpu else None
    done = groups * point.micro_batches * tokens
    row |= {"step_s": seconds, "tokens_per_s": done / seconds, "peak_gib": peak}
    row["peak_over_plan"] = peak / row["planned_gib"] if on_gpu else None
    row["step_over_plan"] = seconds / row["planned_s"] if on_gpu else None
    peak_rate = peak_tflops(torch.cuda.get_device_name(device), dtype) if on_gpu else None
    if peak_rate:
        work = done * count_flops(model).training_full(tokens) / seconds / layout.world_size
        row["mfu"] = work / (peak_rate * 1e12)
    del model, optimizer, loss
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return row


def planned(config, layout: DistributedConfig, point: Point, tokens: int) -> dict:
    """What the planner says of a point, in GiB and seconds."""
    sizes = ModelSizes(plans.meta_model(config))
    what = (sizes, layout, held_parameters(sizes, layout), tokens, point.checkpointing)
    used = memory(*what, point.micro_batches > 1)
    step = speed(*what, count_flops(sizes.model), point.micro_batches, 8, Rates())
    parts = {name: value / GIB for name, value in asdict(used).items()}
    return {"planned_gib": used.gib, "planned_parts_gib": parts, "planned_s": step.step}


def make_model(
    config: Qwen3MoeConfig,
    layout: DistributedConfig,
    point: Point,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The model, sharded as `layout` says, with random weights made on the device."""
    from trl.trainer.utils import add_fused_lm_head

    model = random_model(
        config,
        layout,
        device,
        seed=dist.get_rank() // layout.tp_size,
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation="fastmoe",
    )
    if point.checkpointing:
        model.activation_checkpointing_enable()
    add_fused_lm_head(model)
    return enable_sequence_parallel(model.train(), layout.sp_size)


def train_step(model: nn.Module, optimizer, ids: torch.Tensor, micro_batches: int) -> torch.Tensor:
    """Forward and backward of each micro-batch, clipping and the optimizer; the last loss."""
    sharded = hasattr(model, "set_requires_gradient_sync")
    for index in range(micro_batches):
        if sharded:  # as Trainer: gradients are reduced in the last micro-batch
            model.set_requires_gradient_sync(index == micro_batches - 1)
        loss = loss_of(model, ids) / micro_batches
        loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
