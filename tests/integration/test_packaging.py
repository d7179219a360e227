"""The package as it is declared and as it is built: ranges, pins, and a wheel in an empty venv."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hf_moe_ep import kernel, versions

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def ranges(requirements: list[str]) -> dict[str, SpecifierSet]:
    return {r.name: r.specifier for r in map(Requirement, requirements)}


# What is declared


def test_core_ranges_are_the_ones_checked_at_import():
    declared = ranges(PROJECT["dependencies"])
    assert declared.pop("packaging") == SpecifierSet()
    assert declared == {name: SpecifierSet(spec) for name, spec in versions.REQUIRED.items()}
    assert PROJECT["requires-python"] == versions.PYTHON


def test_optional_ranges_are_the_ones_checked_in_use():
    declared = ranges(EXTRAS["trl"]) | ranges(EXTRAS["hub"])
    for name, spec in versions.OPTIONAL.items():
        assert declared[name] == SpecifierSet(spec)


def test_core_does_not_depend_on_kernels_or_trl():
    assert not {"kernels", "trl"} & ranges(PROJECT["dependencies"]).keys()


def test_this_environment_is_in_range():
    versions.check_versions(versions.REQUIRED | versions.OPTIONAL)


@pytest.mark.parametrize("found", ["5.22.4", "5.24.0", "6.0.0", None])
def test_unsupported_transformers_is_named_with_its_range(monkeypatch, found):
    real = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda name: found if name == "transformers" else real(name)
    )
    with pytest.raises(ImportError, match=r"transformers.*transformers>=5\.23,<5\.24") as error:
        versions.check_versions()
    assert "torch" not in str(error.value) and (found is None or found in str(error.value))


def test_import_checks_versions_before_anything_else():
    """`import hf_moe_ep` beside a wrong transformers fails with the range, not inside a module."""
    script = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '5.22.0' if name == 'transformers' else real(name)\n"
        "import hf_moe_ep"
    )
    out = run([sys.executable, "-c", script])
    assert out.returncode == 1
    assert "ImportError: hf-moe-ep" in out.stderr and ">=5.23,<5.24" in out.stderr


def test_one_ruff_version_for_pre_commit_and_ci():
    (pin,) = (r for r in map(Requirement, EXTRAS["dev"]) if r.name == "ruff")
    (revision,) = re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert str(pin.specifier) == f"=={revision}"


def test_kernel_repository_is_the_one_the_loader_asks_for():
    general = tomllib.loads((ROOT / "kernel_repo/build.toml").read_text())["general"]
    assert general["hub"]["repo-id"] == kernel.HUB_REPO
    assert general["version"] == kernel.HUB_VERSION
    assert general["license"] == PROJECT["license"]


def test_published_sources_import_what_the_builder_generates():
    """Op registrations go through the generated prefix, or builds would share a namespace."""
    for path in (ROOT / "kernel_repo/torch-ext/fastmoe").rglob("*.py"):
        assert "fastmoe::" not in path.read_text() or path.name == "_ops.py", path


# What is built


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the sdist, built from a copy of the sources: no stale build folder."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    skip = shutil.ignore_patterns("build", "__pycache__", "*.egg-info")
    for name in ("hf_moe_ep", "kernel_repo", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    built = run(command)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def python_files(folder: Path, prefix: str) -> set[str]:
    """Paths as in the wheel; os.walk, because rglob stays out of linked folders."""
    return {
        (Path(prefix) / Path(at, name).relative_to(folder)).as_posix()
        for at, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    }


def test_wheel_holds_every_source_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    python = {n for n in names if n.endswith(".py")}
    kernel_package = ROOT / "kernel_repo/torch-ext/fastmoe"
    assert python == python_files(ROOT / "hf_moe_ep", "hf_moe_ep") | python_files(
        kernel_package, "fastmoe"
    )
    configs = {f"fastmoe/configs/{p.name}" for p in (kernel_package / "configs").glob("*.json")}
    assert configs and configs <= names


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    text = archive.read(name).decode()
    assert f"Version: {versions.__version__}\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", text, flags=re.MULTILINE)
    assert ranges(required) == ranges(PROJECT["dependencies"])


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The python of a venv that holds the wheel, and sees this environment's other packages.

    They come through a .pth line, which puts them on the path but does not run the .pth files among
    them: the editable install of this checkout stays out.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    out = run([*command, "--no-deps", "--no-index", "--force-reinstall", str(wheel)])
    assert out.returncode == 0, out.stderr
    return python


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_MOE_EP_KERNEL")}


def test_wheel_works_in_an_empty_venv_without_kernels(installed, tmp_path):
    script = """
import sys
sys.modules["kernels"] = None  # as if it were not installed
import torch, fastmoe, hf_moe_ep
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "fastmoe" in ALL_EXPERTS_FUNCTIONS
x = torch.randn(6, 8, requires_grad=True)
weights, index = torch.randn(6, 4).softmax(-1).topk(2)
up, down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
out = fastmoe.fused_experts(x, index, weights, up, down)
torch.testing.assert_close(out, fastmoe.reference_experts(x, index, weights, up, down))
out.sum().backward()
assert x.grad.isfinite().all()
print(hf_moe_ep.__file__, fastmoe.__file__, sep="\\n")
"""
    out = run([installed, "-c", script], cwd=tmp_path, env=clean_environment())
    assert out.returncode == 0, out.stderr
    for path in out.stdout.strip().splitlines()[-2:]:
        assert Path(path).is_relative_to(installed.parents[1])


def test_installed_command(installed, tmp_path):
    """The console script of the wheel starts: `doctor` reads the whole package."""
    command = [installed.parent / "hf-moe-ep", "doctor"]
    out = run(command, cwd=tmp_path, env=clean_environment())
    assert out.returncode == 0, out.stdout + out.stderr
    assert str(installed.parents[1]) in out.stdout
