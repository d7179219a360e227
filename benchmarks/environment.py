"""Says on what, with what and by which command a result was measured, as a dictionary that goes
into its JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "hf-moe-ep",
    "liger-kernel",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
)
VARIABLES = (
    "HF_MOE_EP_",
    "TRITON_",
    "LIGER_",
    "CUTE_DSL_ARCH",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_",
    "PYTORCH_",
    "TORCH_SYMM_MEM_",
)


def describe(device: torch.device, command: str, commit: str | None = None) -> dict[str, object]:
    """Device, driver, versions, command, commit and date (UTC) of a run; everything is JSON.

    The commit is `commit`, else $HF_MOE_EP_COMMIT, else what git says about this checkout, else
    "unknown".
    """
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        "command": command,
        "commit": commit or os.environ.get("HF_MOE_EP_COMMIT") or _git_commit() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, e.g. "NVIDIA H200", or the CPU's as the system knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.machine()}"


def command(program: str, argv: list[str]) -> str:
    """The command for the record, without what says nothing about the figures: where they go, and
    the commit.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--commit")
    return f"{program} {shlex.join(parser.parse_known_args(argv)[1])}".strip()


def torchrun(module: str, argv: list[str]) -> str:
    """The command of a benchmark of several ranks, for the record."""
    launch = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']} -m benchmarks.{module}"
    return command(launch, argv)


def device_slug(device: torch.device) -> str:
    """The device's name in a file name, e.g. nvidia-h200; plain "cpu" for every CPU."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__  # with the build, e.g. 2.11.0+cu130, which the metadata may lack
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    out = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return out.splitlines()[0] if out else None


def _git_commit() -> str | None:
    # An installed copy may lie inside somebody else's repository: only a file that git tracks
    # says which commit it is.
    if _output("git", "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    # Results and the tables made from them change while benchmarks run; only the sources count.
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    return f"{commit}-dirty" if changed else commit
