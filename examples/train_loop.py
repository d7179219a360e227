"""A training loop without Trainer, whole: a sharded MoE model, gradient accumulation, clipping,
AdamW, a check for NaNs and the export. Runs on one process as on many:

    torchrun --nproc-per-node 8 examples/train_loop.py --model Qwen/Qwen3-30B-A3B \\
        --text manual.txt --output trained --fsdp_size 8 --ep_size 8

Ranks of one tp group read the same rows of text, all others rows of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_ep import DistributedConfig  # and registers "fastmoe"
from hf_moe_ep.training import FiniteCheck, RouterLossCallback, clip_grad_norm_, param_groups


def main(argv: list[str] | None = None) -> list[float]:
    """Trains as the command line says; returns the loss of every step."""
    args = parse(argv)
    layout = DistributedConfig(tp_size=args.tp_size, fsdp_size=args.fsdp_size, ep_size=args.ep_size)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, experts_implementation="fastmoe", distributed_config=layout, dtype=args.dtype
    ).train()
    if torch.cuda.is_available():
        model.cuda()
    RouterLossCallback().install(model)  # the auxiliary loss weighted as the cross-entropy is
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, lr=args.lr))
    check = FiniteCheck(model, optimizer, every=args.log_every)

    rank = dist.get_rank() if dist.is_initialized() else 0
    dp_rank, dp_size = rank // args.tp_size, args.fsdp_size
    if args.global_batch % (dp_size * args.micro_batch):
        raise ValueError(
            f"--global_batch {args.global_batch} is no multiple of --micro_batch "
            f"{args.micro_batch} x {dp_size} data-parallel ranks"
        )
    rows = text_rows(args.model, args.text, args.length)
    losses = []
    for step in range(args.steps):
        first = step * args.global_batch
        batch = rows[torch.arange(first, first + args.global_batch) % len(rows)].to(model.device)
        micro_batches = batch.view(-1, dp_size, args.micro_batch, args.length)[:, dp_rank]
        # Every target of the batch weighs the same. Gradients are averaged over dp_size ranks.
        targets = batch[:, 1:].numel() / dp_size
        loss = accumulate(model, micro_batches, targets)
        check.gradients()
        norm = clip_grad_norm_(model.parameters(), args.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        check.values()
        losses.append(mean_over_ranks(loss))
        if rank == 0 and (step + 1) % args.log_every == 0:
            print(f"step {step + 1}: loss {losses[-1].item():.4f}, gradient norm {norm.item():.3f}")
    check.raise_if_found()
    model.save_pretrained(args.output)  # gathers what is sharded: every rank calls it
    return torch.stack(losses).tolist()


def accumulate(model, micro_batches: torch.Tensor, targets: float) -> torch.Tensor:
    """Adds the gradients of all micro-batches (N, B, L); FSDP2 reduces them in the last one only.

    Returns the loss (), which is a sum: `targets` has divided the micro-batches' shares.
    """
    total = torch.zeros((), device=micro_batches.device)
    for n, ids in enumerate(micro_batches):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(n == len(micro_batches) - 1)
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    return total


def mean_over_ranks(loss: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


def text_rows(model: str, file: str, length: int) -> torch.Tensor:
    """The text as token ids, (rows, length) int64; what does not fill a row is left out."""
    ids = AutoTokenizer.from_pretrained(model)(Path(file).read_text())["input_ids"]
    ids = torch.tensor(ids[: len(ids) // length * length])
    if not len(ids):
        raise ValueError(f"--text {file} has fewer than --length {length} tokens")
    return ids.view(-1, length)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a hub name or a folder")
    parser.add_argument("--text", required=True, help="a file of plain text")
    parser.add_argument("--output", required=True, help="where the trained model goes")
    parser.add_argument("--dtype", default="bfloat16")
    for name in ("tp_size", "fsdp_size", "ep_size"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--global_batch", type=int, default=16, help="rows per optimizer step")
    parser.add_argument("--micro_batch", type=int, default=1, help="rows per forward and rank")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--max_norm", type=float, default=1.0)
    parser.add_argument("--log_every", type=int, default=10)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
