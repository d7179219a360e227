"""Block shapes for the GEMM kernels: data per GPU in configs/*.json.

They are looked up by a bucket of rows per expert. A bucket holds every token count with about as
many rows for each expert, so no token count is ever tuned at run time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files

import torch

from .device import INTERPRETING, has_tma

BUCKETS = (16, 32, 64, 128)  # rows per expert, rounded up; also block_m
_STAGED = 32768  # bytes of results in shared memory on their way out


@dataclass(frozen=True)
class GemmConfig:
    """How one kernel is tiled.

    block_n counts columns of the activation where gate and up share a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    # One loop over tiles and depth, so that a tile's loads start during its predecessor's end.
    flatten: bool = False
    # Programs for each multiprocessor: two hide one's epilogue behind the other's GEMM.
    ctas: int = 1

    def pieces(self, itemsize: int) -> int:
        """How many bulk copies, 1 or 2, take a tile of "linear" away."""
        return 2 if self.block_m * self.block_n * itemsize > _STAGED else 1

    def staged(self, kernel: str, itemsize: int, wide: bool) -> int:
        """Bytes of results that wait in shared memory for their bulk copies.

        "up_gate" writes h and a, whose blocks share a buffer where h is twice as wide as a.
        """
        tile = self.block_m * self.block_n * itemsize
        if kernel == "linear":
            return tile // self.pieces(itemsize)
        return (tile if wide else tile + tile // 2) if kernel == "up_gate" else 0

    def fitted(self, itemsize: int, columns: int, staged: int, limit: int) -> GemmConfig:
        """This config with as many stages as `limit` bytes of shared memory hold, at least one.

        A stage is (block_m + columns) x block_k operands. Two are kept where they fit but for the
        `staged` bytes: without Hopper's MMA Triton holds one stage less than it is told.
        """
        stage = (self.block_m + columns) * self.block_k * itemsize
        most = max((limit - staged) // stage, min(2, limit // stage), 1)
        return replace(self, num_stages=min(self.num_stages, most))


def bucket(num_slots: int, num_experts: int) -> int:
    """The bucket for `num_slots` rows spread over `num_experts` experts: 16, 32, 64 or 128."""
    rows = -(-num_slots // max(num_experts, 1))
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


@lru_cache(maxsize=256)
def gemm_config(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, wide: bool = False
) -> GemmConfig:
    """The config of `kernel` in bucket `rows`.

    `kernel`: "up_gate", "linear", "gate_backward" or "weight_grad". `wide`: the kernel holds gate
    and up columns at once. Raises KeyError for an unknown kernel. Row tiles are as tall as the
    bucket.
    """
    table, limit = _table(device)
    config = table["fp32" if dtype == torch.float32 else str(rows)][kernel]
    if kernel != "weight_grad":
        config = replace(config, block_m=rows)
    staged = config.staged(kernel, dtype.itemsize, wide) if has_tma(device) else 0
    return config.fitted(dtype.itemsize, config.block_n * (2 if wide else 1), staged, limit)


@lru_cache
def _table(device: torch.device) -> tuple[dict[str, dict[str, GemmConfig]], int]:
    """The configs for a device, and its shared memory for one program in bytes."""
    name, limit = config_name(device)
    data = json.loads((files(__package__) / "configs" / f"{name}.json").read_text())
    return {
        b: {k: GemmConfig(**c) for k, c in kernels.items()}
        for b, kernels in data["buckets"].items()
    }, limit


def config_name(device: torch.device) -> tuple[str, int]:
    """Which file of configs/ serves the device, and its shared memory limit in bytes.

    Hopper and newer use the H200's measured table; everything older the A100's, compiled for sm_80
    but not measured.
    """
    if device.type == "cpu":
        if not INTERPRETING:
            raise ValueError("the Triton kernels run on CPU tensors only under TRITON_INTERPRET=1")
        return "interpreter", 1 << 30
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return ("h200" if hopper else "a100"), limit
