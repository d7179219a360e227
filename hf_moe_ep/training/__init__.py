"""Trainer and TRL glue: FLOPs of a model, peaks of devices, telemetry in the logs."""

from .devices import DevicePeak, peak_tflops
from .flops import AttentionTerm, FlopCount, count_flops
from .telemetry import MoETelemetryCallback, batch_replicas, register

__all__ = [
    "AttentionTerm",
    "DevicePeak",
    "FlopCount",
    "MoETelemetryCallback",
    "batch_replicas",
    "count_flops",
    "peak_tflops",
    "register",
]
