"""Trainer and TRL glue, and helpers for training loops of your own."""

from .accumulation import AccumulateInPlaceCallback, accumulate_in_place
from .adamw import AdamW, FastAdamWMixin
from .callbacks import register
from .checkpoint import CheckpointSaver, load_checkpoint, save_checkpoint
from .checkpoint_export import export_checkpoint, export_model
from .checkpoint_trainer import ShardedCheckpointMixin
from .devices import DevicePeak, peak_tflops
from .finite import FiniteCheck, FiniteCheckCallback
from .flops import AttentionTerm, FlopCount, count_flops
from .gradients import clip_grad_norm_, param_groups
from .losses import GlobalRouterLossCallback, RouterLossCallback
from .recompute import KeepRoutingCallback
from .telemetry import MoETelemetryCallback, batch_replicas
from .token_counts import TokenCountCallback

__all__ = [
    "AccumulateInPlaceCallback",
    "AdamW",
    "AttentionTerm",
    "CheckpointSaver",
    "DevicePeak",
    "FastAdamWMixin",
    "FiniteCheck",
    "FiniteCheckCallback",
    "FlopCount",
    "GlobalRouterLossCallback",
    "KeepRoutingCallback",
    "MoETelemetryCallback",
    "RouterLossCallback",
    "ShardedCheckpointMixin",
    "TokenCountCallback",
    "accumulate_in_place",
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
