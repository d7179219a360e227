"""Whether training in bf16 with expert parallelism stays finite and follows fp32 master weights.

    torchrun --nproc-per-node 2 -m benchmarks.stability

Two runs from the same weights on the same text, --steps each, with FiniteCheck in every step: all
in bf16, then with fp32 weights and optimizer state (bf16 compute, FSDP2's mixed precision). Also
times the check. Qwen3-30B-A3B's layers, --layers of them; a token is a byte of Python's manual.
Fails (exit 1) on a value that is not finite, or where the losses of the first steps differ. The
file is written every 20 steps, so what was seen before a time-out stands in it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hf_moe_ep import DistributedConfig
from hf_moe_ep.cli.demo.data import documents
from hf_moe_ep.training import FiniteCheck, clip_grad_norm_, param_groups

from .environment import describe, device_slug, torchrun
from .ranks import join, save
from .timing import synchronize

BYTES = 256
START = 20  # steps over which the two runs have to agree
AGREE = 0.02  # relative difference of their mean losses there
WRITE = 20  # steps between two writes of the file


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    device = join()
    result = {
        "benchmark": "stability",
        "mode": "stability",
        "ranks": dist.get_world_size(),
        "dtype": "bfloat16",
        "layers": args.layers,
        "tokens_per_rank": args.tokens,
        "steps": args.steps,
        "lr": args.lr,
        "rows": [],
        "environment": describe(device, torchrun("stability", argv), args.commit),
    }
    path = args.out / f"stability{dist.get_world_size()}-{device_slug(device)}.json"
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            _save_model(shared[0], args, device)
        dist.barrier()
        for name in ("bf16", "fp32 master"):
            result["rows"].append({"run": name})
            _run(shared[0], result["rows"][-1], args, device, partial(save, result, path))
        dist.barrier()
    result |= {
        "first_steps_differ_by": _difference(result["rows"], slice(START)),
        "last_steps_differ_by": _difference(result["rows"], slice(-START, None)),
    }
    save(result, path)
    if dist.get_rank() == 0:
        for row in result["rows"]:
            print({k: v for k, v in row.items() if k not in ("loss", "gradient_norm")})
        print(f"first steps differ by {result['first_steps_differ_by']:.2%}; {path}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    wrong = any("not_finite" in row for row in result["rows"])
    return int(wrong or not result["first_steps_differ_by"] <= AGREE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stability", allow_abbrev=False, description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of each rank, one row")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ep_implementation", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny layers, to try the benchmark")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    return parser


def _save_model(folder: str, args: argparse.Namespace, device: torch.device) -> None:
    sizes = dict(hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32)
    sizes |= dict(num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8)
    if args.small:
        sizes = dict(hidden_size=32, moe_intermediate_size=24, num_attention_heads=4)
        sizes |= dict(num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2)
    config = Qwen3MoeConfig(
        **sizes,
        vocab_size=BYTES,
        num_hidden_layers=args.layers,
        max_position_embeddings=args.tokens,
        rope_theta=1e6,
        output_router_logits=True,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _run(
    folder: str, row: dict, args: argparse.Namespace, device: torch.device, write: Callable
) -> None:
    """One training run into its row of the result, the same on every rank but for the times."""
    world = dist.get_world_size()
    master = row["run"] == "fp32 master"
    layout = DistributedConfig(
        fsdp_size=world,
        ep_size=world,
        ep_implementation=args.ep_implementation,
        fsdp_mixed_precision=master,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation="fastmoe",
        distributed_config=layout,
        dtype=torch.float32 if master else torch.bfloat16,
    ).train()
    optimizer = torch.optim.AdamW(
        param_groups(model, 0.01, lr=args.lr), fused=device.type == "cuda"
    )
    check = FiniteCheck(model, optimizer, every=10)
    text = torch.tensor(list("\n".join(documents()).encode()))
    starts = torch.Generator().manual_seed(dist.get_rank())
    losses, norms, seconds = [], [], []
    for step in range(args.steps):
        at = int(torch.randint(len(text) - args.tokens, (), generator=starts))
        ids = text[at : at + args.tokens].unsqueeze(0).to(device)
        synchronize(device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        check.gradients()
        norms.append(clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        try:
            check.values()
        except FloatingPointError as error:
            row["not_finite"] = str(error)
            break
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean / world)
        optimizer.zero_grad()
        if (step + 1) % WRITE == 0:
            _note(row, losses, norms)
            write()
    _note(row, losses, norms)
    row |= _check_cost(model, check, device, statistics.median(seconds))
    del model, optimizer, check
    gc.collect()
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    write()


def _note(row: dict, losses: list, norms: list) -> None:
    row["loss"], row["gradient_norm"] = (torch.stack(v).tolist() for v in (losses, norms))


def _check_cost(model, check: FiniteCheck, device: torch.device, step_s: float) -> dict:
    """Milliseconds of both checks of a step, and their share of it; without the interval's wait."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    check.every = 10**9
    times = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        check.gradients()
        check.values()
        synchronize(device)
        times.append(time.perf_counter() - start)
    cost = statistics.median(times[2:])
    return {"step_ms": step_s * 1e3, "check_ms": cost * 1e3, "check_share": cost / step_s}


def _difference(rows: list[dict], steps: slice) -> float:
    """Of the two runs' mean losses over some of the steps that both have, relative; NaN of none."""
    runs = [row.get("loss", []) for row in rows]
    both = min(map(len, runs))
    ours, master = (losses[:both][steps] for losses in runs)
    if not ours:
        return float("nan")
    return abs(statistics.mean(ours) - statistics.mean(master)) / statistics.mean(master)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
