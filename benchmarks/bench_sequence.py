"""The sequence-parallel benchmark: training steps of a Qwen3-30B-A3B with four layers, one sequence
over all ranks (Ulysses, sp_size = ranks) beside one sequence on each rank.

    torchrun --nproc-per-node 2 -m benchmarks.bench_sequence
    torchrun --nproc-per-node 2 -m benchmarks.bench_sequence --tokens 65536,131072 --rounds 2 \\
        --warm_up 1 --longest 60    # and the longest sequence that the ranks hold together

Both models are sharded alike (FSDP2 and EP over all ranks) and have the same random weights, made
on the device. A correctness gate first; then all ranks time the same calls in the same order, and
the slowest rank's times count. A step is forward and backward, without the optimizer; the loss is
TRL's, which never holds all logits. T tokens of one sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_moe_ep import DistributedConfig
from hf_moe_ep.sequence_parallel import enable_sequence_parallel

from .environment import describe, device_slug, torchrun
from .ranks import join, save, slowest
from .timing import spread, synchronize

GIB = 2**30
QWEN3_30B_A3B = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    max_position_embeddings=1 << 20,
)
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
)
LONG = 4096  # the longest sequence is found to a multiple of this


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    device = join()
    on_gpu = device.type == "cuda"
    sizes, dtype = (QWEN3_30B_A3B, torch.bfloat16) if on_gpu else (TINY, torch.float32)
    ranks = dist.get_world_size()
    models = {size: make_model(sizes, args, size, dtype, device) for size in (1, ranks)}
    result = {
        "benchmark": "sequence",
        "mode": "sequence",
        "ranks": ranks,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": args.layers,
        "attention": args.attention,
        "checkpointing": args.checkpointing,
        "gate": gate(models, dtype, device),
        "rows": [],
        "environment": describe(device, torchrun("bench_sequence", argv), args.commit),
    }
    name = "checkpointing" if args.checkpointing else "plain"
    name += "-long" if args.longest else ""
    path = args.out / f"sequence{ranks}-{name}-{device_slug(device)}.json"
    for tokens in [int(t) for t in args.tokens.split(",")]:
        result["rows"] += measure(models, tokens, args, device)
        save(result, path)
    if args.longest:
        result["longest"] = {"sp_size": ranks, "ended_by": "running"}
        longest(models[ranks], result, args.longest, path, device)
    dist.barrier()
    dist.destroy_process_group()
    return int(bool(result["gate"]["wrong"]))


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench_sequence", allow_abbrev=False, description=__doc__)
    parser.add_argument("--tokens", default="16384,32768,65536,131072" if on_gpu else "64,128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=2, help="rounds before those")
    parser.add_argument("--longest", type=float, default=0, help="seconds to find what fits; 0: no")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    return parser


def make_model(
    sizes: dict, args: argparse.Namespace, sp_size: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The model sharded over all ranks; the same weights for every `sp_size`."""
    from trl.trainer.utils import add_fused_lm_head

    ranks = dist.get_world_size()
    layout = DistributedConfig(fsdp_size=ranks, ep_size=ranks, sp_size=sp_size)
    config = Qwen3MoeConfig(num_hidden_layers=args.layers, **sizes)
    layout, _, mesh = Qwen3MoeForCausalLM.prepare_distribute_model(layout)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(
            config,
            dtype=dtype,
            attn_implementation=args.attention,
            experts_implementation="fastmoe",
        )
    model = Qwen3MoeForCausalLM.maybe_distribute_model(model, layout, mesh)
    model.to_empty(device=device)
    rotary = type(model.model.rotary_emb)(config=config).to(device)
    model.model.rotary_emb = rotary  # its buffers are no weights
    torch.manual_seed(dist.get_rank())
    for name, parameter in model.named_parameters():
        own = parameter.detach().to_local()
        nn.init.ones_(own) if "norm" in name else nn.init.normal_(own, std=0.02)
    if args.checkpointing:
        model.activation_checkpointing_enable()
    add_fused_lm_head(model)
    return enable_sequence_parallel(model.train(), sp_size)


def sequence(tokens: int, device: torch.device, seed: int) -> Tensor:
    """(1, T) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY["vocab_size"], (1, tokens), generator=generator).to(device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss


def step(model: nn.Module, ids: Tensor) -> None:
    model.zero_grad()
    loss_of(model, ids).backward()


def gate(models: dict[int, nn.Module], dtype: torch.dtype, device: torch.device) -> dict:
    """Loss and gradient norm of one sequence, shared by the ranks and computed whole on each."""
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    ids, found = sequence(1000, device, seed=0), {}
    for size, model in models.items():
        model.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        squares = [p.grad.to_local().float().square().sum() for p in model.parameters()]
        square = torch.stack(squares).sum()
        dist.all_reduce(square)
        found[size] = {"loss": loss.item(), "gradient_norm": square.sqrt().item()}
        model.zero_grad()
    one, shared = found.values()
    errors = {k: abs(shared[k] - one[k]) / abs(one[k]) for k in one}
    return {"errors": errors, "bound": bound, "wrong": not max(errors.values()) < bound}


def measure(
    models: dict[int, nn.Module], tokens: int, args: argparse.Namespace, device: torch.device
) -> list[dict]:
    """One row per model: the spread of its step time, and its memory."""
    # With sp_size 1 every rank has a sequence of its own.
    inputs = {n: sequence(tokens, device, 0 if n > 1 else dist.get_rank()) for n in models}
    times = {n: [] for n in models}
    for index in range(args.rounds + args.warm_up):
        for n, model in models.items():
            ms = _milliseconds(lambda model=model, ids=inputs[n]: step(model, ids), device)
            if index >= args.warm_up:  # the first rounds compile and warm up
                times[n].append(ms)
    rows = []
    for n, model in models.items():
        memory = memory_of(model, inputs[n], device)
        row = {"T": tokens, "sp_size": n, "step": asdict(spread(times[n])), **memory}
        row["tokens_per_s"] = tokens * dist.get_world_size() / n / row["step"]["median_ms"] * 1e3
        rows.append(row)
    if dist.get_rank() == 0:
        one, shared = rows
        ratio = {"step": shared["step"]["median_ms"] / one["step"]["median_ms"]}
        if one["activations_gib"]:
            ratio["activations"] = shared["activations_gib"] / one["activations_gib"]
        print(f"T={tokens}: {json.dumps(rows)}\n  sp / 1: {ratio}", flush=True)
    return rows


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    """Wall time of the slowest rank, all starting together."""
    flag = torch.zeros(1, device=device)
    dist.all_reduce(flag)
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return slowest([1e3 * (time.perf_counter() - start)], device)[0]


def memory_of(model: nn.Module, ids: Tensor, device: torch.device) -> dict:
    """GiB of the fullest rank: kept from forward to backward, and the most of a step, both over
    what was there before (weights of both models), and the process's most, all told."""
    if device.type != "cuda":
        return {"activations_gib": None, "peak_gib": None, "process_gib": None}
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = loss_of(model, ids)
    kept = torch.cuda.memory_allocated(device) - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated(device)
    model.zero_grad()
    values = slowest([v / GIB for v in (kept, peak - before, peak)], device)
    return dict(zip(("activations_gib", "peak_gib", "process_gib"), values, strict=True))


def longest(
    model: nn.Module, result: dict, seconds: float, path: Path, device: torch.device
) -> None:
    """Steps of twice the tokens each, up to what memory or `seconds` allow; into result["longest"].

    Memory grows along a straight line, time with the square, from the longest two sequences so far.
    A process that runs out of memory ends the benchmark; what was found before is in the file.
    """
    found = result["longest"]
    found["steps"] = [
        {"T": r["T"], "step_s": r["step"]["median_ms"] / 1e3, "process_gib": r["process_gib"]}
        for r in result["rows"]
        if r["sp_size"] == found["sp_size"]
    ]
    end = time.perf_counter() + seconds
    while found["ended_by"] == "running":
        before, last = found["steps"][-2:]
        found["fits"] = fits(before, last, device)
        tokens = min(2 * last["T"], found["fits"])
        expected = last["step_s"] * (tokens / last["T"]) ** 2
        late = slowest([time.perf_counter() + expected - end], device)[0] > 0
        if tokens <= last["T"] or late:
            found["ended_by"] = "seconds" if tokens > last["T"] else "memory"
            break
        found["trying"] = tokens
        save(result, path)
        found["steps"].append(one_step(model, tokens, device))
        if dist.get_rank() == 0:
            print(f"sp_size={found['sp_size']}: {found['steps'][-1]}", flush=True)
    save(result, path)


def fits(before: dict, last: dict, device: torch.device) -> int:
    """Tokens that fill 0.92 of the memory that torch can have, by two steps; the rest is lost
    between its blocks. On a CPU four times the last.
    """
    if device.type != "cuda":
        return 4 * last["T"]
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    least = -slowest([-available / GIB], device)[0]  # of any rank
    slope = (last["process_gib"] - before["process_gib"]) / (last["T"] - before["T"])
    return int((0.92 * least - last["process_gib"]) / slope + last["T"]) // LONG * LONG


def one_step(model: nn.Module, tokens: int, device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ids = sequence(tokens, device, 0)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    try:
        ms = _milliseconds(lambda: step(model, ids), device)
    except torch.OutOfMemoryError as error:
        print(f"{tokens} tokens do not fit: {error}", file=sys.stderr, flush=True)
        os._exit(3)  # the other ranks wait in a collective that this one will not join
    model.zero_grad()
    most = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    over, process = slowest([(most - before) / GIB, most / GIB], device) if on_gpu else (None, None)
    return {"T": tokens, "step_s": ms / 1e3, "peak_gib": over, "process_gib": process}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
