"""Builds kernel variants for development and tests: build/torch-<backend> from torch-ext/fastmoe.

The official builder (nix) makes the variants that are published. A variant without compiled code is
a copy of the Python with a generated _ops.py and a metadata.json, which this script makes in the
same shape, so that `kernels` loads it and our tests see what a hub user would.

    python kernel_repo/make_variant.py [--output kernel_repo/build] [--backend cpu --backend cuda]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

REPO = Path(__file__).resolve().parent

OPS = '''"""Generated: the namespace of this build's custom ops."""

import torch

_OPS_NAME = "{name}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def sources(package: Path, extensions: list[str]) -> dict[Path, bytes]:
    """The files of a variant by relative path, without the development stand-in _ops.py."""
    return {
        path.relative_to(package): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.suffix.removeprefix(".") in extensions and path != package / "_ops.py"
    }


def unique_id(files: dict[Path, bytes]) -> str:
    """A short digest of the sources: builds of different sources never share op names."""
    digest = hashlib.sha256()
    for path, content in files.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:10]


def make_variant(backend: str, output: Path, repo: Path = REPO) -> Path:
    """Writes the variant of `backend` under `output`, replacing an older one, and returns its path.

    Raises:
        ValueError: build.toml is invalid, or does not list `backend`.
    """
    Build.open(repo)
    toml = tomllib.loads((repo / "build.toml").read_text())
    general = toml["general"]
    if backend not in general["backends"]:
        raise ValueError(f"backend {backend!r} is not in build.toml: {general['backends']}")
    package = general["name"].replace("-", "_")
    files = sources(repo / "torch-ext" / package, toml["torch-noarch"]["pyext"])
    name = f"_{package}_{backend}_{unique_id(files)}"
    files[Path("_ops.py")] = OPS.format(name=name).encode()

    variant = output / f"torch-{backend}"
    shutil.rmtree(variant, ignore_errors=True)
    for path, content in files.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_bytes(content)
    write_metadata(variant, name, general, backend)
    return variant


def write_metadata(variant: Path, name: str, general: dict, backend: str) -> None:
    """metadata.json with the digest of everything else in `variant`, read back by `kernels`."""
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    metadata = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": general.get("python-depends", []),
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digest.files},
    }
    path = variant / "metadata.json"
    path.write_text(json.dumps(metadata, indent=2) + "\n")
    Metadata.read_from_file(path).digest.validate(Digest.hash_variant(digest.algorithm, variant))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPO / "build")
    parser.add_argument("--backend", action="append", help="repeatable; default: cpu and cuda")
    args = parser.parse_args()
    for backend in args.backend or ("cpu", "cuda"):
        print(make_variant(backend, args.output))


if __name__ == "__main__":
    main()
