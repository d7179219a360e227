"""`hf-moe-ep plan`: layouts of a model for training on given GPUs, by estimated step time, with the
memory of one GPU part by part, the bytes it sends, and the command that runs the layout.

Nothing is loaded but the model's config. Memory is that of `sft` with AdamW and TRL's fused head.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from .. import plans
from ..plans.memory import PRECISIONS
from ..plans.search import USABLE, Job, Proposal, propose
from ..plans.speed import Rates

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "recomputed", "gathered")
PARTS += ("ep_buffers", "logits", "peak")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hf-moe-ep plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="hub name, folder or config.json")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of one GPU; default 80")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of a sequence")
    parser.add_argument(
        "--global-batch", type=int, help="sequences of an optimizer step; default: one per GPU"
    )
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="bf16",
        help="bf16: weights, gradients and AdamW in bfloat16; mixed: in fp32, computing in bf16",
    )  # fmt: skip
    parser.add_argument(
        "--network", type=float, default=Rates.network / 1e9,
        help="GB/s between nodes, per GPU; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=5, help="layouts to show; default %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints layouts for what `argv` says; 0, 1 where none fits, 2 where it cannot be planned."""
    args = parse(argv)
    batch = args.gpus if args.global_batch is None else args.global_batch
    job = Job(args.gpus, args.gpus_per_node, args.gpu_memory, args.seq_len, batch, args.precision)
    try:
        found = propose(plans.meta_model(args.model), job, Rates(network=args.network * 1e9))
    except ValueError as error:
        print(f"hf-moe-ep plan: error: {error}", file=sys.stderr)
        return 2
    shown = found[: args.top]
    if args.json:
        rows = [as_dict(p, job, args.model) for p in shown]
        print(json.dumps({"job": asdict(job), "layouts": rows}, indent=2))
    else:
        print(report(shown, job, args.model))
    return 0 if found[0].fits else 1


def as_dict(proposal: Proposal, job: Job, model: str) -> dict:
    """A proposal as plain values: bytes and seconds."""
    return {
        "fits": proposal.fits,
        "sizes": proposal.sizes(),
        "activation_checkpointing": proposal.checkpointing,
        "micro_batches": proposal.micro_batches,
        "step_seconds": proposal.speed.step,
        "tokens_per_second": job.global_batch * job.seq_len / proposal.speed.step,
        "seconds": asdict(proposal.speed),
        "memory": asdict(proposal.memory),
        "distributed_config": proposal.config.to_dict(),
        "python": in_python(proposal, model),
        "command": command(proposal, job, model),
    }


def in_python(proposal: Proposal, model: str) -> str:
    sizes = "".join(f", {name}={value}" for name, value in proposal.sizes().items())
    return f"DistributedConfig.for_model({model!r}{sizes})"


def command(proposal: Proposal, job: Job, model: str) -> str:
    """The sft command of a layout, without its data."""
    flags = [f"--model_name_or_path {model}", f"--max_length {job.seq_len}"]
    flags += [f"--{name} {value}" for name, value in proposal.sizes().items()]
    flags += ["--per_device_train_batch_size 1"]
    flags += [f"--gradient_accumulation_steps {proposal.micro_batches}"]
    flags += [f"--activation_checkpointing {proposal.checkpointing}"]
    if job.precision == "bf16":
        flags += ["--dtype bfloat16"]
    elif job.gpus > 1:
        flags += ['--model_init_kwargs \'{"distributed_config": {"fsdp_mixed_precision": true}}\'']
    nodes = -(-job.gpus // job.gpus_per_node)
    start = f"torchrun --nproc-per-node {min(job.gpus, job.gpus_per_node)}"
    start += (
        f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else ""
    )
    return f"{start} -m hf_moe_ep sft {' '.join(flags)}"


def report(shown: list[Proposal], job: Job, model: str) -> str:
    tokens = job.global_batch * job.seq_len
    best = shown[0]
    lines = [f"{model}: {job.global_batch} x {job.seq_len} tokens a step on {job.gpus} GPUs"]
    if not best.fits:
        lines.append(
            f"No layout fits {job.gpu_memory:g} GiB; nearest first. More GPUs, shorter sequences, "
            "or LoRA would help."
        )
    header = ["", "step s", "tokens/s", *PARTS, "NVLink GB", "network GB"]
    rows = [header] + [_row(n, p, tokens) for n, p in enumerate(shown, 1)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += ["", "GiB of one GPU; peak is their largest sum at one moment"]
    lines += ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    lines.append("")
    for n, p in enumerate(shown, 1):
        extra = " with activation checkpointing" if p.checkpointing else ""
        lines.append(f"{n}  {in_python(p, model)}{extra}")
    lines += ["", f"First: {command(best, job, model)}", ""]
    lines.append(
        f"Estimates: H200 rates, balanced routing; {USABLE:.0%} of a GPU's memory is taken as "
        "usable."
    )
    return "\n".join(lines)


def _row(number: int, p: Proposal, tokens: int) -> list[str]:
    parts = [f"{getattr(p.memory, part) / GIB:.1f}" for part in PARTS]
    sent = [f"{n / 1e9:.1f}" for n in (p.speed.nvlink_bytes, p.speed.network_bytes)]
    mark = str(number) if p.fits else f"{number} too large"
    return [mark, f"{p.speed.step:.2f}", f"{tokens / p.speed.step:,.0f}", *parts, *sent]
