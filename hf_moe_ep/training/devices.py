"""How many dense matrix-multiply TFLOP/s a GPU promises, by the name the driver gives it.

Data from vendors' datasheets, never estimated: a device that is not in the table has no peak, and
so no MFU. Units: TFLOP/s (1e12), without structured sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernel import get_kernel


@dataclass(frozen=True)
class DevicePeak:
    """Dense peak of one device, TFLOP/s; None where the hardware has no such mode."""

    bf16: float | None  # tensor cores, fp32 accumulation: 989.4 on H200
    fp16: float | None  # tensor cores, fp32 accumulation: 989.4 on H200
    tf32: float | None  # tensor cores on fp32 operands rounded to TF32: 494.7 on H200
    fp32: float | None  # full fp32 (AMD: matrix cores): 66.9 on H200
    source: str  # "NVIDIA H200 datasheet"


_H100_SXM = DevicePeak(989.4, 989.4, 494.7, 66.9, "NVIDIA H100 architecture whitepaper, table 1")
_H200 = DevicePeak(989.4, 989.4, 494.7, 66.9, "NVIDIA H200 datasheet")
_A100 = DevicePeak(312.0, 312.0, 156.0, 19.5, "NVIDIA A100 datasheet")
_B200 = DevicePeak(2250.0, 2250.0, 1100.0, 80.0, "NVIDIA Blackwell architecture brief, HGX B200")
_GB200 = DevicePeak(2500.0, 2500.0, 1250.0, 90.0, "NVIDIA Blackwell architecture brief, GB200")
_V100_SXM2 = DevicePeak(None, 125.0, None, 15.7, "NVIDIA V100 datasheet")

# Keys are exact: a MIG slice ("... MIG 1g.10gb") or a laptop part has another name, so no peak.
# GeForce: the rate with fp32 accumulation, half of the one with fp16 accumulation.
PEAKS: dict[str, DevicePeak] = {
    "NVIDIA B200": _B200,
    "NVIDIA GB200": _GB200,
    "NVIDIA H200": _H200,
    "NVIDIA H200 NVL": DevicePeak(835.5, 835.5, 417.5, 60.0, "NVIDIA H200 datasheet, NVL"),
    "NVIDIA GH200 480GB": DevicePeak(989.4, 989.4, 494.7, 66.9, "NVIDIA GH200 datasheet"),
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 NVL": DevicePeak(835.5, 835.5, 417.5, 60.0, "NVIDIA H100 datasheet, NVL"),
    "NVIDIA H100 PCIe": DevicePeak(756.0, 756.0, 378.0, 51.2, "NVIDIA H100 whitepaper, table 1"),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A10": DevicePeak(125.0, 125.0, 62.5, 31.2, "NVIDIA A10 datasheet"),
    "NVIDIA A30": DevicePeak(165.0, 165.0, 82.0, 10.3, "NVIDIA A30 datasheet"),
    "NVIDIA A40": DevicePeak(149.7, 149.7, 74.8, 37.4, "NVIDIA A40 datasheet"),
    "NVIDIA RTX A6000": DevicePeak(154.8, 154.8, 77.4, 38.7, "NVIDIA GA102 whitepaper, RTX A6000"),
    "NVIDIA L4": DevicePeak(121.0, 121.0, 60.0, 30.3, "NVIDIA L4 datasheet, halved for density"),
    "NVIDIA L40": DevicePeak(181.05, 181.05, 90.5, 90.5, "NVIDIA L40 datasheet"),
    "NVIDIA L40S": DevicePeak(362.05, 362.05, 183.0, 91.6, "NVIDIA L40S datasheet"),
    "NVIDIA GeForce RTX 3090": DevicePeak(71.0, 71.0, 35.6, 35.6, "NVIDIA GA102 whitepaper"),
    "NVIDIA GeForce RTX 4090": DevicePeak(165.2, 165.2, 82.6, 82.6, "NVIDIA Ada whitepaper"),
    "NVIDIA GeForce RTX 5090": DevicePeak(
        209.5, 209.5, 104.8, 104.8, "NVIDIA RTX Blackwell whitepaper"
    ),
    "Tesla V100-SXM2-16GB": _V100_SXM2,
    "Tesla V100-SXM2-32GB": _V100_SXM2,
    "Tesla T4": DevicePeak(None, 65.0, None, 8.1, "NVIDIA T4 datasheet"),
    "AMD Instinct MI300X": DevicePeak(1307.4, 1307.4, 653.7, 163.4, "AMD MI300X data sheet"),
    "AMD Instinct MI325X": DevicePeak(1307.4, 1307.4, 653.7, 163.4, "AMD MI325X data sheet"),
}


def peak_tflops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in TFLOP/s, or None for a device or a dtype the table does not know.

    device_name: what `torch.cuda.get_device_name()` returns. float32 counts as TF32 where the
    process allows it (`torch.set_float32_matmul_precision("high")`, or
    `torch.backends.cuda.matmul.fp32_precision = "tf32"`), else as full fp32.
    """
    peak = PEAKS.get(device_name)
    if peak is None:
        return None
    if dtype == torch.float32:
        return peak.tf32 if get_kernel().matmul_precision(dtype) == "tf32" else peak.fp32
    return {torch.bfloat16: peak.bf16, torch.float16: peak.fp16}.get(dtype)
