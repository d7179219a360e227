"""`hf-moe-ep doctor`: does this machine, with these settings, run the wanted layout, and how?

Every line is one check: ok, note (worth knowing), or problem (it will not work; what to change).
The exit status is 1 when there is a problem. Nothing is downloaded but the config of a hub model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict

import torch
from packaging.specifiers import SpecifierSet

from .. import kernel, plans, versions
from ..config import DistributedConfig
from ..plans import Check

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ("ep_size", "tp_size", "fsdp_size", "dp_replicate_size", "sp_size")


def version_checks() -> list[Check]:
    checks = []
    python = platform.python_version()
    supported = SpecifierSet(versions.PYTHON).contains(python)
    detail = f"{python}, supported: {versions.PYTHON}"
    checks.append(Check("versions", "python", "ok" if supported else "problem", detail))
    for package, spec in (versions.REQUIRED | versions.OPTIONAL).items():
        found, problem = versions.installed(package), versions.version_problem(package, spec)
        if problem is None:
            check = Check("versions", package, "ok", f"{found}, supported: {spec}")
        elif found is None and package in versions.OPTIONAL:
            check = Check("versions", package, "note", f"not installed (optional): {spec}")
        else:
            check = Check("versions", package, "problem", problem)
        checks.append(check)
    triton = versions.installed("triton")
    checks.append(
        Check("versions", "triton", "ok" if triton else "note", triton or "not installed")
    )
    return checks


def device_checks() -> list[Check]:
    if not torch.cuda.is_available():
        return [Check("device", "gpu", "note", "no GPU: the PyTorch path on the CPU is used")]
    checks = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
        checks.append(Check("device", f"gpu {index}", "ok", detail))
    return checks


def kernel_checks() -> list[Check]:
    """Where the kernels come from, and which backend serves each dtype."""
    source = kernel.kernel_source()
    try:
        module = kernel.get_kernel()
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        return [Check("kernel", "source", "problem", f"HF_MOE_EP_KERNEL={source}: {error}")]
    checks = [Check("kernel", "source", "ok", f"{source}: {module.__file__}")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in DTYPES:
        parts = module.kernel_backends(dtype, device)
        names = "; ".join(
            f"{backend} for {', '.join(part for part, b in parts.items() if b == backend)}"
            for backend in dict.fromkeys(parts.values())
        )
        detail = f"{names}: {backend_reason(parts['routing'], device)}"
        checks.append(Check("kernel", str(dtype).removeprefix("torch."), "ok", detail))
    return checks


def backend_reason(backend: str, device: torch.device) -> str:
    if device.type == "cpu":
        interpreted = "TRITON_INTERPRET=1 runs the Triton kernels in Python"
        return interpreted if backend == "triton" else "no GPU"
    if versions.installed("triton") is None:
        return "triton is not installed; install triton"
    if torch.version.hip is not None:
        return "Triton serves ROCm (correctness and speed unmeasured)"
    major, minor = torch.cuda.get_device_capability(device)
    wanted = "needs 8.0" if backend == "torch" else "8.0 or newer"
    return f"compute capability {major}.{minor} ({wanted})"


def hub_checks() -> list[Check]:
    """What the `kernels` package can do here; nothing is downloaded."""
    from transformers.utils import is_kernels_available

    found = versions.installed("kernels")
    if found is None:
        detail = "not installed; HF_MOE_EP_KERNEL=hub or a path needs it: hf-moe-ep[hub]"
        return [Check("hub", "kernels", "note", detail)]
    checks = [Check("hub", "kernels", "ok", f"{found}; hub kernel: {kernel.hub_repo()}")]
    if not is_kernels_available():
        detail = (
            f"transformers does not accept kernels {found} for its own hub kernels; fastmoe does"
        )
        checks.append(Check("hub", "transformers", "note", detail))
    if local := os.environ.get("LOCAL_KERNELS"):
        checks.append(Check("hub", "LOCAL_KERNELS", "note", local))
    return checks


def registration_checks() -> list[Check]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if "fastmoe" in ALL_EXPERTS_FUNCTIONS:
        return [Check("transformers", "experts_implementation", "ok", '"fastmoe" is registered')]
    detail = '"fastmoe" is not registered; run `import hf_moe_ep` before the model is loaded'
    return [Check("transformers", "experts_implementation", "problem", detail)]


def filled(sizes: dict[str, int | None], world_size: int | None) -> dict[str, int | None]:
    """The sizes with fsdp_size, if it is not given, taking the processes that the others leave."""
    if sizes["fsdp_size"] or not any(sizes.values()):
        return sizes
    tp, replicas = sizes["tp_size"] or 1, sizes["dp_replicate_size"] or 1
    smallest = max(-(-(sizes["ep_size"] or 1) // tp), sizes["sp_size"] or 1)
    left = world_size // (tp * replicas) if world_size else smallest
    return sizes | {"fsdp_size": max(1, left)}


def layout_checks(sizes: dict[str, int | None], world_size: int | None) -> list[Check]:
    """The wanted mesh: its own rules, the number of processes, and who else would shard."""
    try:
        config = DistributedConfig(**sizes)
    except ValueError as error:
        return [Check("layout", "sizes", "problem", str(error))]
    axes = {
        "dp_replicate": config.dp_replicate_size,
        "fsdp": config.fsdp_size,
        "tp": config.tp_size,
    }
    needed = config.world_size
    mesh = ", ".join(f"{k} {v}" for k, v in axes.items())
    detail = f"{mesh}; experts: ep {config.ep_size}, efsdp {config.efsdp_size}; {needed} processes"
    checks = [Check("layout", "mesh", "ok", detail)]
    if config.sp_size > 1:
        detail = f"{config.sp_size} ranks share a sequence"
        checks.append(Check("layout", "sequence", "ok", detail))
    if world_size is not None and world_size != needed:
        detail = f"{world_size} processes, but the layout needs {needed}: {mesh}"
        checks.append(Check("layout", "world size", "problem", detail))
    elif world_size is None and needed > max(1, torch.cuda.device_count()):
        detail = f"start {needed} processes; this machine has {torch.cuda.device_count()} GPUs"
        checks.append(Check("layout", "world size", "note", detail))
    return checks + (plans.conflict_checks() if needed > 1 else [])


def model_checks(name: str, sizes: dict[str, int | None]) -> list[Check]:
    """Whether a model, by folder or hub name, fits sizes that fit each other."""
    try:
        config = DistributedConfig(**sizes)
    except ValueError:  # layout_checks says so
        return []
    try:
        return plans.model_checks(plans.meta_model(name), config)
    except ValueError as error:
        return [Check("model", name, "problem", str(error))]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hf-moe-ep doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--model", help="folder with a config.json, or a hub name")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help="as in transformers' DistributedConfig")
    parser.add_argument(
        "--world_size", type=int, help="processes; default: WORLD_SIZE if it is set"
    )
    return parser.parse_args(argv)


def diagnose(args: argparse.Namespace) -> list[Check]:
    world = args.world_size or int(os.environ.get("WORLD_SIZE", 0)) or None
    sizes = filled({name: getattr(args, name) for name in SIZES}, world)
    checks = version_checks() + device_checks() + kernel_checks() + hub_checks()
    checks += registration_checks()
    if any(size is not None for size in sizes.values()):
        checks += layout_checks(sizes, world)
    if args.model:
        checks += model_checks(args.model, sizes)
    return checks


def main(argv: list[str]) -> int:
    """Prints the checks that `argv` asks for and returns the exit status."""
    args = parse(argv)
    checks = diagnose(args)
    problems = [check for check in checks if check.status == "problem"]
    if args.json:
        print(json.dumps({"ok": not problems, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        for check in checks:
            label = f"{check.section}: {check.name}"
            print(f"{check.status:8}{label:38} {check.detail}")
        print(f"\n{len(problems)} problem(s)" if problems else "\nNo problems found.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
