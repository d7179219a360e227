"""Loads the kernel as its users do: by its hub name, which LOCAL_KERNELS points at a local build.

The official builder's shells set LOCAL_KERNELS; elsewhere a build is made for the test session.
"""

import importlib.util
import os
from pathlib import Path

import kernels
import pytest

REPO_ID = "hf-moe-ep/fastmoe"


@pytest.fixture(scope="session")
def fastmoe(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if "LOCAL_KERNELS" not in os.environ:
            build = tmp_path_factory.mktemp("fastmoe") / "build"
            _make_variants(build)
            patch.setenv("LOCAL_KERNELS", f"{REPO_ID}={build}")
        return kernels.get_kernel(REPO_ID, version=1)


def _make_variants(build: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "make_variant.py"
    spec = importlib.util.spec_from_file_location("make_variant", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for backend in ("cpu", "cuda", "rocm"):
        module.make_variant(backend, build)
