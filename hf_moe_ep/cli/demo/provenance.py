"""Where a result comes from: the device, the versions, and the commit of a git checkout."""

import platform
import subprocess
from pathlib import Path

import torch

from ...versions import __version__, installed

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "tokenizers")


def device_name(device: str) -> str:
    """The GPU's name, or "CPU (x86_64), 2 threads"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str | None]:
    """Package -> installed version, None where it is missing."""
    ours = {"hf-moe-ep": __version__, "python": platform.python_version()}
    return ours | {package: installed(package) for package in PACKAGES}


def commit() -> str | None:
    """The commit of the checkout this file belongs to, else None.

    It ends in "+changes" where tracked files differ from that commit.
    """
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
