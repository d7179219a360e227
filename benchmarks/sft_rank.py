"""One rank of a case of bench_sft: imports everything, waits for its turn, and trains through
`hf-moe-ep sft`'s own code. `python -m benchmarks.sft_rank`, with a job as a line of JSON on stdin.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import trl
from transformers import TrainerCallback

from hf_moe_ep.cli import sft
from hf_moe_ep.training import count_flops, peak_tflops

from .environment import describe, device_slug
from .random_model import load_random
from .ranks import slowest
from .timing import spread, synchronize

GIB = 2**30


class StepClock(TrainerCallback):
    """Notes the device's time at the end of every optimizer step, without waiting for it."""

    def __init__(self, device: torch.device, job: dict):
        self.device, self.warmup, self.tokens = device, job["warmup"], job["tokens"]
        self.attention: str | None = None
        self._marks: list = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())
        if len(self._marks) == self.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.device.type == "cuda":
            self.attention = attention_backend(model.config, self.tokens, self.device)

    def times_ms(self) -> list[float]:
        """From the end of a step to the end of the next, data loading included, in milliseconds."""
        synchronize(self.device)
        pairs = zip(self._marks[self.warmup - 1 :], self._marks[self.warmup :], strict=False)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]


def main() -> int:
    job = json.loads(sys.stdin.readline())
    os.environ["MASTER_PORT"] = str(job["port"])
    arguments = sft.prepare(job["argv"])
    training = arguments[1]
    clock = StepClock(training.device, job)
    trainer = sft.make_trainer(*arguments, load=load_random)
    trainer.add_callback(clock)
    trainer.train()
    row = measured(trainer, clock, job)
    if training.process_index == 0:
        env = describe(training.device, job["command"], job["commit"])
        env["packages"]["trl"] = trl.__version__
        result = {"row": row, "environment": env, "device": device_slug(training.device)}
        result["dtype"] = str(trainer.model.dtype).removeprefix("torch.")
        Path(job["result"]).write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def measured(trainer, clock: StepClock, job: dict) -> dict:
    """What the run took; the slowest rank's times and the fullest rank's memory count."""
    device, world = clock.device, trainer.args.world_size
    on_gpu = device.type == "cuda"
    own = clock.times_ms()
    times = slowest(own, device) if dist.is_initialized() else own
    step = spread(times)
    layout = (trainer.args.model_init_kwargs or {}).get("distributed_config")
    groups = world // layout.sp_size // layout.tp_size if layout else 1
    tokens = groups * trainer.args.per_device_train_batch_size * job["tokens"]
    logs = trainer.state.log_history
    loss = logs[-1]["train_loss"]
    if not math.isfinite(loss):
        raise ValueError(f"the mean loss is {loss}")
    row = {
        "step": asdict(step),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / step.median_ms * 1e3,
        "mean_loss": loss,
        "attention": clock.attention,
        "logged": {key: log[key] for log in logs for key in LOGGED if key in log},
    }
    peak = peak_tflops(torch.cuda.get_device_name(device), trainer.model.dtype) if on_gpu else None
    if on_gpu:
        most = torch.cuda.max_memory_allocated(device) / GIB
        row["peak_gib"] = slowest([most], device)[0] if dist.is_initialized() else most
    if peak:
        flops = count_flops(trainer.model)
        per_s = row["tokens_per_s"] / world / (peak * 1e12)
        row["mfu"] = flops.training_full(job["tokens"]) * per_s
        row["mfu_causal"] = flops.training_causal(job["tokens"]) * per_s
    return row


# Of the last log that has them: what moe_telemetry says of the run.
LOGGED = ("tokens_per_second", "mfu", "expert_load_max_over_mean", "peak_memory_gib", "grad_norm")


def attention_backend(config, tokens: int, device: torch.device) -> str:
    """What torch's attention function runs for full causal rows of this model in bf16."""
    q, k = (
        torch.empty(1, heads, tokens, config.head_dim, dtype=torch.bfloat16, device=device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    chosen = torch._fused_sdp_choice(
        q.requires_grad_(), k, k, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.nn.attention.SDPBackend(chosen).name


if __name__ == "__main__":
    sys.exit(main())
