"""Throughput, MFU, expert balance and peak memory in the logs of transformers' Trainer and TRL.

A callback cannot reach the reporters that stand before it in the Trainer's list, and the built-in
ones (trackio, tensorboard, wandb, ...) stand before everything passed as `callbacks=`. So there are
two ways to switch it on that put it first:

    TrainingArguments(..., report_to=["moe_telemetry", "trackio"])  # after register(); YAML too
    MoETelemetryCallback(...).attach(trainer)                       # any options

`Trainer(callbacks=[MoETelemetryCallback()])` works too, for the callbacks after it, the progress
bar and `trainer.state.log_history`. Nothing waits for the device between two logs.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from torch import nn
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import DefaultFlowCallback

from .batch_tokens import TokenCounter
from .devices import peak_tflops
from .expert_load import ExpertLoadSampler, summarise
from .flops import FlopCount, count_flops

logger = logging.getLogger(__name__)

REPORT_NAME = "moe_telemetry"  # in TrainingArguments.report_to
STATE_KEY = "hf_moe_ep.telemetry"  # in TrainerState.stateful_callbacks, so in trainer_state.json


def register() -> None:
    """Make `report_to=["moe_telemetry", ...]` known to transformers. Idempotent."""
    INTEGRATION_TO_CALLBACK[REPORT_NAME] = MoETelemetryCallback


@dataclass
class Totals:
    """What a stretch of training did, over all ranks; a batch that ranks share counts once."""

    seconds: float = 0.0  # wall time without evaluation and saving
    tokens: int = 0  # real tokens, as in batch_tokens
    flops_full: float = 0.0  # model FLOPs of forward and backward, non-causal convention
    flops_causal: float = 0.0  # the same, causal-adjusted

    def add(self, other: Totals) -> None:
        """Count another stretch in."""
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.flops_full += other.flops_full
        self.flops_causal += other.flops_causal


def batch_replicas(model: nn.Module) -> int:
    """Ranks that are given the same batch: those of a tensor-parallel or a sequence-parallel group.

    Sequence parallelism on the tp axis shares the batch of its tp group. Expert and data parallel
    ranks hold batches of their own, and context-parallel ones each a slice of the sequence.
    """
    if (tp_size := getattr(model, "_tp_size", None)) is not None:
        layout = getattr(model.config, "distributed_config", None)
        return tp_size * (getattr(layout, "sp_size", None) or 1)
    config = AcceleratorState().parallelism_config if is_initialized() else None
    return 1 if config is None else config.tp_size


def training_totals(
    flops: FlopCount, sums: list[int], replicas: int, seconds: float = 0.0
) -> Totals:
    """Totals from `TokenCounter.sums` summed over all ranks, of which `replicas` saw each batch."""
    tokens, *keys = (s // replicas for s in sums)
    weights = tokens * (3 * flops.weights - flops.frozen)
    per_key = [3 * t.flops_per_key for t in flops.attention]
    full = sum(f * k for f, k in zip(per_key, keys[0::2], strict=True))
    causal = sum(f * k for f, k in zip(per_key, keys[1::2], strict=True))
    return Totals(seconds, tokens, weights + full, weights + causal)


class MoETelemetryCallback(TrainerCallback):
    """Adds these to the Trainer's logs. "Window": since the last log; cumulative: of the whole run.

    | key | meaning |
    | --- | --- |
    | mfu, mfu_cumulative | model FLOPs, non-causal attention, over the devices' dense peak |
    | mfu_causal, mfu_causal_cumulative | the same with causal-adjusted attention |
    | tflops_per_device | model TFLOP/s of one device in the window, non-causal attention |
    | tokens_per_second, tokens_per_second_per_device | real tokens in the window |
    | tokens_seen | real tokens since the run began, checkpoints it resumed from included |
    | expert_load_max_over_mean, ..._worst | `ExpertLoad`, where the window has a sampled step |
    | expert_idle_share | `ExpertLoad.idle_share` |
    | peak_memory_gib | CUDA: most memory allocated by the process so far, highest rank |

    MFU is left out on a device whose peak is unknown (see devices.py). The head counts for every
    token, also where a trainer skips ignored labels; recomputation never counts. Only calls of the
    model in training mode with gradients count: not evaluation, generation or a reference model's,
    and not a loss that calls a part of the model instead of the model.

    expert_load_every: sample the expert load in every n-th step; 0 never does.
    device_peak_tflops: dense peak of one device in TFLOP/s, instead of the table's.
    """

    def __init__(self, expert_load_every: int = 10, device_peak_tflops: float | None = None):
        if expert_load_every < 0:
            raise ValueError(f"expert_load_every={expert_load_every}: give 0 (never) or more")
        self.expert_load_every = expert_load_every
        self.device_peak_tflops = device_peak_tflops
        self.flops: FlopCount | None = None
        self._handle = None
        self._sampler: ExpertLoadSampler | None = None

    def attach(self, trainer) -> MoETelemetryCallback:
        """Put this callback before the trainer's reporters, and count the model's FLOPs now."""
        callbacks = trainer.callback_handler.callbacks
        flow = [i for i, c in enumerate(callbacks) if isinstance(c, DefaultFlowCallback)]
        callbacks.insert(flow[0] + 1 if flow else 0, self)
        self.flops = count_flops(trainer.model)
        return self

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if REPORT_NAME in args.report_to and args.report_to[0] != REPORT_NAME:
            raise ValueError(f"report_to={args.report_to}: put {REPORT_NAME!r} before the others")
        self.flops = count_flops(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hooks()
        if args.n_gpu > 1:
            logger.warning(
                "moe_telemetry is off: torch.nn.DataParallel (%d GPUs in one process) copies the "
                "model in every step; start one process per GPU with torchrun",
                args.n_gpu,
            )
            return
        self.flops = self.flops or count_flops(model)
        self._device = args.device
        self._replicas = batch_replicas(model)
        self._peak = self.device_peak_tflops or _table_peak(args, model)
        self._counter = TokenCounter(self.flops.attention, args.device)
        self._handle = model.register_forward_pre_hook(self._count_batch, with_kwargs=True)
        self._sampler = ExpertLoadSampler(model, args.device) if self.expert_load_every else None
        stored = state.stateful_callbacks.get(STATE_KEY, {"attributes": {}})
        self._total, self._window = Totals(**stored["attributes"]), Totals()
        self._logged_step = state.global_step
        self._mark: float | None = (
            self._now()
        )  # start of what _drain adds next; None: clock stopped

    def on_step_begin(self, args, state, control, **kwargs):
        if self._sampler is not None:
            self._sampler.active = state.global_step % self.expert_load_every == 0

    def on_step_end(self, args, state, control, **kwargs):
        if self._sampler is not None:
            self._sampler.active = False
        self._pause(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._pause(state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        before_training = state.global_step == 0  # eval_on_start
        if self._handle is not None and (self._mark is None or before_training):
            self._mark = None if control.should_save else self._now()

    def on_save(self, args, state, control, **kwargs):
        # A save that another callback asked for ran on the clock: its time stays counted.
        if self._handle is not None and self._mark is None:
            self._mark = self._now()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._handle is None or state.global_step == 0:
            return
        if "train_runtime" in logs:  # the Trainer's last log
            self._drain()
            ours = self._cumulative()
        elif "loss" in logs and state.global_step > self._logged_step:
            self._drain()
            ours = self._of_window() | self._cumulative() | self._expert_load() | self._memory()
            self._window, self._logged_step = Totals(), state.global_step
            self._store(state)
        else:
            return
        logs.update(ours)
        state.log_history[-1].update(ours)  # the Trainer copied `logs` there before it called us

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _count_batch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training and torch.is_grad_enabled():
            self._counter.add(kwargs if not args else {"input_ids": args[0], **kwargs})

    def _pause(self, state, control) -> None:
        """Stop the clock before evaluation or saving."""
        if self._handle is not None and (control.should_evaluate or control.should_save):
            self._drain()
            self._mark = None
            self._store(state)

    def _store(self, state) -> None:
        """Leave the totals where a checkpoint keeps them, in the form transformers has for it."""
        state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": asdict(self._total)}

    def _drain(self) -> None:
        """Wait for the device; move its sums and the elapsed time into window and total."""
        now = self._now()
        seconds = 0.0 if self._mark is None else now - self._mark
        self._mark = None if self._mark is None else now
        sums = _all_reduce(self._counter.sums.clone(), dist.ReduceOp.SUM).tolist()
        self._counter.sums.zero_()
        part = training_totals(self.flops, sums, self._replicas, seconds)
        self._window.add(part)
        self._total.add(part)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _of_window(self) -> dict[str, float]:
        window, world = self._window, _world_size()
        if window.seconds == 0.0:
            return {}
        per_second = window.tokens / window.seconds
        logs = {
            "tokens_per_second": per_second,
            "tokens_per_second_per_device": per_second / world,
            "tflops_per_device": window.flops_full / window.seconds / world / 1e12,
        }
        return logs | self._mfu(window, "")

    def _cumulative(self) -> dict[str, float]:
        return {"tokens_seen": self._total.tokens} | self._mfu(self._total, "_cumulative")

    def _mfu(self, totals: Totals, suffix: str) -> dict[str, float]:
        if self._peak is None or totals.seconds == 0.0:
            return {}
        possible = totals.seconds * _world_size() * self._peak * 1e12
        return {
            f"mfu{suffix}": totals.flops_full / possible,
            f"mfu_causal{suffix}": totals.flops_causal / possible,
        }

    def _expert_load(self) -> dict[str, float]:
        if self._sampler is None or not self._sampler.experts_per_layer:
            return {}
        rows = _all_reduce(self._sampler.rows.clone(), dist.ReduceOp.SUM).tolist()
        self._sampler.rows.zero_()
        load = summarise(rows, self._sampler.experts_per_layer)
        if load is None:
            return {}
        return {
            "expert_load_max_over_mean": load.max_over_mean,
            "expert_load_max_over_mean_worst": load.worst_max_over_mean,
            "expert_idle_share": load.idle_share,
        }

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {}
        peak = torch.tensor(torch.cuda.max_memory_allocated(self._device), device=self._device)
        return {"peak_memory_gib": _all_reduce(peak, dist.ReduceOp.MAX).item() / 2**30}

    def _remove_hooks(self) -> None:
        """Take every hook off the model; also those of a run that ended in an exception."""
        if self._handle is not None:
            self._handle.remove()
        if self._sampler is not None:
            self._sampler.remove()
        self._handle = self._sampler = None


def _table_peak(args, model: nn.Module) -> float | None:
    """The device table's peak for the dtype this run multiplies in; None off CUDA."""
    if args.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    return peak_tflops(torch.cuda.get_device_name(args.device), dtype)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _all_reduce(tensor: torch.Tensor, op) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor
