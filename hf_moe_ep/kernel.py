"""The only door to the kernel package `fastmoe`: bundled, from the kernels hub, or from disk.

HF_MOE_EP_KERNEL chooses: "bundled" (default), "hub", or the path of a kernel repository, of its
build folder or of one build variant. The `kernels` package checks no digest when it loads a build,
so builds are checked here before their code runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from .versions import OPTIONAL, version_problem

HUB_REPO = "hf-moe-ep/fastmoe"
HUB_VERSION = 1
API = (
    "fused_experts",
    "Gate",
    "Routing",
    "route",
    "reference_experts",
    "backend_name",
    "exchange",
    "kernel_backends",
    "route_experts",
    "sum_rows",
    "adamw_",
    "scale_",
    "square_sum",
    "first_not_finite",
    "matmul_precision",
)


@cache
def get_kernel() -> ModuleType:
    """The kernel package, loaded once per process.

    HF_MOE_EP_KERNEL_REPO=owner/name replaces the hub repository, LOCAL_KERNELS=owner/name=path puts
    a path in its place. A publisher that the hub does not trust is refused by `kernels` itself.

    Raises:
        ValueError: no build is found where HF_MOE_EP_KERNEL points, or its files were changed.
        ImportError: the `kernels` package is missing, or the kernel lacks a part of the API.
    """
    source = kernel_source()
    if source == "bundled":
        import fastmoe as module
    elif source == "hub":
        module = _load(_hub_build(hub_repo()))
    else:
        module = _load(Path(source).expanduser())
    missing = [name for name in API if not hasattr(module, name)]
    if missing:
        raise ImportError(
            f"the kernel at {module.__file__} (HF_MOE_EP_KERNEL={source}) has no "
            f"{', '.join(missing)}; use a build that belongs to this release, or the bundled kernel"
        )
    return module


def kernel_source() -> str:
    """What HF_MOE_EP_KERNEL asks for: "bundled", "hub" or a path."""
    return os.environ.get("HF_MOE_EP_KERNEL") or "bundled"


def hub_repo() -> str:
    """The kernels-hub repository that HF_MOE_EP_KERNEL=hub loads, as owner/name."""
    return os.environ.get("HF_MOE_EP_KERNEL_REPO") or HUB_REPO


def _kernels() -> ModuleType:
    if problem := version_problem("kernels", OPTIONAL["kernels"]):
        raise ImportError(f"{problem}, or unset HF_MOE_EP_KERNEL to use the bundled kernels")
    import kernels

    return kernels


def _hub_build(repo: str) -> Path:
    """The build of `repo` for this machine, downloaded, or the path LOCAL_KERNELS gives for it."""
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        name, _, path = entry.partition("=")
        if name == repo:
            return Path(path)
    from huggingface_hub.constants import HF_HUB_OFFLINE

    install = _kernels().install_kernel
    return install(repo, version=HUB_VERSION, local_files_only=HF_HUB_OFFLINE)


def _load(root: Path) -> ModuleType:
    """The build that `kernels` picks for this machine at `root`, where every build is checked."""
    kernels = _kernels()
    patterns = ("metadata.json", "*/metadata.json", "build/*/metadata.json")
    builds = [m.parent for pattern in patterns for m in sorted(root.glob(pattern))]
    if not builds:
        raise ValueError(
            f"no kernel build at {root}: HF_MOE_EP_KERNEL must be bundled, hub, or a folder with "
            "build/<variant>/metadata.json (kernel_repo/make_variant.py makes one)"
        )
    for build in builds:
        check_digest(build)
    with _no_cached_bytecode():
        return kernels.get_local_kernel(root)


def check_digest(build: Path) -> None:
    """Holds every file of a build variant against the digest in its metadata.json.

    Raises:
        ValueError: there is no digest, or files were changed, added or removed; names them.
    """
    expected = _kernels().Metadata.read_from_file(build / "metadata.json").digest
    if expected is None:
        raise ValueError(f"the kernel build {build} has no digest in metadata.json; build it again")
    found = type(expected).hash_variant(expected.algorithm, build)
    names = expected.files.keys() | found.files.keys()
    wrong = sorted(n for n in names if expected.files.get(n) != found.files.get(n))
    if wrong:
        raise ValueError(
            f"the kernel build {build} was changed after it was built and is not loaded: "
            f"{', '.join(wrong)} does not match metadata.json; download or build it again"
        )


@contextmanager
def _no_cached_bytecode() -> Iterator[None]:
    """Keeps Python off the __pycache__ folders of a build, which no digest covers."""
    before = sys.pycache_prefix
    with tempfile.TemporaryDirectory() as empty:
        sys.pycache_prefix = empty
        try:
            yield
        finally:
            sys.pycache_prefix = before
