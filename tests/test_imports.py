"""The import rules of the two packages, read with `ast`: who may import whom.

The kernel package stands alone (torch, triton, the standard library), its layers import downwards
only, and the rest of the project reaches it through hf_moe_ep/kernel.py.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fastmoe": ROOT / "kernel_repo/torch-ext/fastmoe", "hf_moe_ep": ROOT / "hf_moe_ep"}

# Layers of the kernel package from the top down. A file in no layer is a leaf: everyone but the
# backends may import it, and it imports no layer.
KERNEL_LAYERS = (
    {"__init__"},
    {"layers"},
    {"moe"},
    {"ahead"},
    {"autograd"},
    {"ops"},
    {"grouped_gemm", "combine", "decode", "exchange", "finite", "optim"},
    {"hopper"},
    {"routing"},
    {"backends"},
)
# The parts of hf_moe_ep that have an order, from the top down.
PLUGIN_LAYERS = (
    {"cli"},
    {"training"},
    {"expert_parallel", "sequence_parallel"},
    {"experts", "collectives"},
    {"kernel"},
)
CUTE = {"cutlass", "quack", "tvm_ffi", "cuda"}


@dataclass(frozen=True)
class Import:
    """`importer` imports `target`, dotted names from the package down: fastmoe.moe, torch.fx.Node.

    guarded: inside a function or a `try`, so that the file imports without it.
    """

    importer: str
    target: str
    relative: bool
    guarded: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.target}"


def imports_of(module: str, source: str, is_package: bool = False) -> list[Import]:
    """Every import in `source`, with relative names resolved against the dotted name `module`."""
    found: list[Import] = []
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, a.name, False, guarded) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                found.append(Import(module, f"{name}.{alias.name}", node.level > 0, guarded))
        inner = guarded or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(source), False)
    return found


def all_imports() -> list[Import]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join((package, *(parts[:-1] if is_package else parts)))
            found.extend(imports_of(module, path.read_text(), is_package))
    return found


def root(name: str) -> str:
    return name.split(".")[0]


def part(name: str) -> str:
    """The file or folder right under the package: fastmoe.backends.triton.gemm is in backends."""
    return (name.split(".") + ["__init__"])[1]


def layer(name: str, layers: tuple[set[str], ...]) -> int | None:
    return next((n for n, names in enumerate(layers) if part(name) in names), None)


def breaks_isolation(i: Import) -> bool:
    """fastmoe imports torch, triton, the standard library and, relatively, itself."""
    if root(i.importer) != "fastmoe" or i.relative:
        return False
    if root(i.target) in CUTE:
        return not i.importer.startswith("fastmoe.backends.cute")
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    return root(i.target) not in allowed or i.target.startswith("torch.distributed")


def breaks_cute_guard(i: Import) -> bool:
    """What needs the CuTe DSL is imported where it can fail: in a function or a `try`."""
    outside = root(i.importer) == "fastmoe" and not i.importer.startswith("fastmoe.backends.cute")
    return outside and i.target.startswith("fastmoe.backends.cute") and not i.guarded


def breaks_kernel_order(i: Import) -> bool:
    """Layers of fastmoe import downwards; backends import no host file, leaves no layer."""
    if root(i.importer) != "fastmoe" or root(i.target) != "fastmoe":
        return False
    if part(i.importer) == part(i.target):
        return False
    if part(i.importer) == "backends":
        return True
    above, below = layer(i.importer, KERNEL_LAYERS), layer(i.target, KERNEL_LAYERS)
    return below is not None and (above is None or below <= above)


def breaks_one_door(i: Import) -> bool:
    """hf_moe_ep imports fastmoe in kernel.py only."""
    outside = root(i.importer) == "hf_moe_ep" and i.importer != "hf_moe_ep.kernel"
    return outside and root(i.target) == "fastmoe"


def breaks_plugin_order(i: Import) -> bool:
    """cli, training, parallelism, experts, kernel: downwards; experts knows no process group."""
    if root(i.importer) != "hf_moe_ep" or part(i.importer) == part(i.target):
        return False
    if i.target.startswith("torch.distributed"):
        return part(i.importer) in {"experts", "kernel"}
    if root(i.target) != "hf_moe_ep":
        return False
    above, below = layer(i.importer, PLUGIN_LAYERS), layer(i.target, PLUGIN_LAYERS)
    return above is not None and below is not None and below <= above


RULES = (
    breaks_isolation,
    breaks_cute_guard,
    breaks_kernel_order,
    breaks_one_door,
    breaks_plugin_order,
)


@pytest.mark.parametrize("breaks", RULES, ids=lambda rule: rule.__name__)
def test_rule(breaks):
    assert not [str(i) for i in all_imports() if breaks(i)]


def test_every_source_is_read():
    read = {i.importer for i in all_imports()}
    assert {"hf_moe_ep.kernel", "hf_moe_ep.versions", "fastmoe._ops", "fastmoe.routing"} <= read


# (file, a line planted in it, the rule that has to notice)
VIOLATIONS = [
    ("fastmoe.moe", "import transformers", breaks_isolation),
    ("fastmoe.moe", "def f():\n    import transformers", breaks_isolation),
    ("fastmoe.moe", "from torch import distributed as dist", breaks_isolation),
    ("fastmoe.routing", "import torch.distributed.tensor", breaks_isolation),
    ("fastmoe.combine", "from fastmoe.routing import Routing", breaks_isolation),
    ("fastmoe.grouped_gemm", "import cutlass", breaks_isolation),
    ("fastmoe.backends.triton.gemm", "import quack", breaks_isolation),
    ("fastmoe.grouped_gemm", "from .backends.cute import gemm", breaks_cute_guard),
    ("fastmoe.routing", "from .autograd import f", breaks_kernel_order),
    ("fastmoe.combine", "from .grouped_gemm import up", breaks_kernel_order),
    ("fastmoe.tuning", "from . import routing", breaks_kernel_order),
    ("fastmoe.backends.triton.gemm", "from ...routing import Routing", breaks_kernel_order),
    ("fastmoe.backends.torch_ops", "from .. import gates", breaks_kernel_order),
    ("hf_moe_ep.experts", "from fastmoe import fused_experts", breaks_one_door),
    ("hf_moe_ep.cli.demo", "import fastmoe.moe", breaks_one_door),
    ("hf_moe_ep.experts", "import torch.distributed as dist", breaks_plugin_order),
    ("hf_moe_ep.experts", "from .training import telemetry", breaks_plugin_order),
    ("hf_moe_ep.expert_parallel.plan", "from ..sequence_parallel import x", breaks_plugin_order),
    ("hf_moe_ep.training.telemetry", "from ..cli import demo", breaks_plugin_order),
]


@pytest.mark.parametrize(("module", "line", "rule"), VIOLATIONS)
def test_planted_violation_is_caught(module, line, rule):
    assert any(rule(i) for i in imports_of(module, line))


ALLOWED = [
    ("fastmoe.moe", "from .autograd import experts\nfrom .gates import Gate\nimport torch"),
    ("fastmoe.routing", "from .backends import torch_ops\nfrom .backends.triton import routing"),
    ("fastmoe.grouped_gemm", "def f():\n    from .backends.cute import gemm"),
    ("fastmoe.backends.cute.gemm", "import cutlass\nimport quack"),
    ("fastmoe.backends.triton.gated", "from .gemm import tile_of\nimport triton.language as tl"),
    ("hf_moe_ep.kernel", "import fastmoe"),
    ("hf_moe_ep.training.telemetry", "from ..experts import forward\nimport torch.distributed"),
]


@pytest.mark.parametrize(("module", "lines"), ALLOWED)
def test_allowed_import_passes(module, lines):
    assert not [str(i) for i in imports_of(module, lines) if any(rule(i) for rule in RULES)]
