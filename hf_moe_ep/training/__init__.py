"""Trainer and TRL glue, and helpers for training loops of your own."""

from .checkpoint import CheckpointSaver, load_checkpoint, save_checkpoint
from .checkpoint_export import export_checkpoint, export_model
from .checkpoint_trainer import ShardedCheckpointMixin
from .devices import DevicePeak, peak_tflops
from .flops import AttentionTerm, FlopCount, count_flops
from .gradients import clip_grad_norm_, param_groups
from .telemetry import MoETelemetryCallback, batch_replicas, register

__all__ = [
    "AttentionTerm",
    "CheckpointSaver",
    "DevicePeak",
    "FlopCount",
    "MoETelemetryCallback",
    "ShardedCheckpointMixin",
    "batch_replicas",
    "clip_grad_norm_",
    "count_flops",
    "export_checkpoint",
    "export_model",
    "load_checkpoint",
    "param_groups",
    "peak_tflops",
    "register",
    "save_checkpoint",
]
