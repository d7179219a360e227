"""A kernel variant built from kernel_repo: what `kernels` makes of it, and what our loader refuses.

Every test that loads a variant in this process builds one from slightly different sources, because
op namespaces are unique per build and can be registered only once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import kernels
import pytest
import torch
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

import fastmoe as bundled
from hf_moe_ep import kernel, versions

KERNEL_REPO = Path(__file__).resolve().parents[2] / "kernel_repo"
load = kernel.get_kernel.__wrapped__  # without the cache of the process


@pytest.fixture(scope="module")
def make_variant():
    spec = util.spec_from_file_location("make_variant", KERNEL_REPO / "make_variant.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repo(tmp_path, make_variant):
    """A kernel repository with a cpu and a cuda variant, whose op namespaces nobody else has."""
    root = tmp_path / "repo"
    shutil.copytree(KERNEL_REPO, root, ignore=shutil.ignore_patterns("build", "__pycache__"))
    with open(root / "torch-ext/fastmoe/gates.py", "a") as file:
        file.write(f"# {tmp_path}\n")
    for backend in ("cpu", "cuda"):
        make_variant.make_variant(backend, root / "build", root)
    return root


def variant_here(repo: Path) -> Path:
    return repo / "build" / ("torch-cuda" if torch.version.cuda else "torch-cpu")


def step(module) -> list[torch.Tensor]:
    """The output of a small layer and its gradients, from fixed inputs."""
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 16, 24, generator=g)
    weights, index = torch.randn(16, 4, generator=g).softmax(-1).topk(2)
    up, down = torch.randn(4, 40, 24, generator=g), torch.randn(4, 24, 20, generator=g)
    leaves = [t.requires_grad_() for t in (x, weights, up, down)]
    out = module.fused_experts(x, index, weights, up, down)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_equals_bundled(module) -> None:
    assert Path(module.__file__).parent != Path(bundled.__file__).parent
    for got, want in zip(step(module), step(bundled), strict=True):
        assert torch.equal(got, want)


# The variant itself


def test_build_toml_and_metadata_are_what_kernels_reads(repo):
    assert {str(b) for b in Build.open(repo).general.backends} >= {"cpu", "cuda"}
    metadata = Metadata.read_from_file(repo / "build/torch-cuda/metadata.json")
    assert (str(metadata.name), metadata.version) == ("fastmoe", kernel.HUB_VERSION)
    assert metadata.id.isidentifier() and metadata.id.startswith("_fastmoe_cuda_")
    found = Digest.hash_variant(DigestAlgorithm.SHA256, repo / "build/torch-cuda")
    metadata.digest.validate(found)
    assert {"__init__.py", "_ops.py", "backends/torch_ops.py"} <= set(found.files)
    assert any(name.startswith("configs/") for name in found.files)


def test_same_sources_give_the_same_namespace_and_others_another(repo, make_variant):
    def name():
        path = make_variant.make_variant("cpu", repo / "build", repo)
        return Metadata.read_from_file(path / "metadata.json").id

    first = name()
    assert name() == first
    (repo / "torch-ext/fastmoe/configs/new.json").write_text("{}")
    assert name() != first


def test_an_unlisted_backend_is_refused(make_variant, tmp_path):
    with pytest.raises(ValueError, match="metal"):
        make_variant.make_variant("metal", tmp_path)


def test_development_ops_file_matches_the_generated_one(repo):
    """Sources that import one import the other."""

    def public_names(path):
        spec = util.spec_from_file_location("ops_under_test", path)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return {n for n in vars(module) if not n.startswith("_")}

    generated = public_names(variant_here(repo) / "_ops.py")
    assert generated == public_names(KERNEL_REPO / "torch-ext/fastmoe/_ops.py")


def test_kernels_info(repo):
    command = "from kernels.cli import main; main()"
    out = subprocess.run(
        [sys.executable, "-c", command, "info", str(repo), "--json"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    info = json.loads(out.stdout)
    assert (info["name"], info["version"], info["backends"]) == ("fastmoe", 1, ["cpu", "cuda"])


def test_kernels_benchmark(repo):
    """The shipped benchmark runs, and its check against the expert loop passes."""
    command = "from kernels.cli import main; main()"
    arguments = ["benchmark", str(repo), "--iterations", "1", "--warmup", "0", "--json"]
    out = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=600
    )
    assert out.returncode == 0, out.stderr
    results = json.loads(out.stdout)["results"]
    assert {r["workload"] for r in results} == {
        "ExpertsBenchmark.forward",
        "ExpertsBenchmark.training",
    }
    assert all(r["verified"] is True for r in results)


# Loading through `kernels`


def test_get_local_kernel(repo):
    module = kernels.get_local_kernel(repo)
    assert module.__all__ == bundled.__all__
    assert_equals_bundled(module)


def test_local_kernels_variable(repo, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"{kernel.HUB_REPO}={repo}")
    module = kernels.get_kernel(kernel.HUB_REPO, version=kernel.HUB_VERSION)
    assert Path(module.__file__).parent == variant_here(repo)
    assert_equals_bundled(module)


@pytest.mark.parametrize("device", ["cuda" if torch.cuda.is_available() else "cpu"])
def test_hub_layer_replaces_the_forward_of_an_experts_module(repo, device):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    @kernels.use_kernel_forward_from_hub("Experts")
    class Layer(Qwen3MoeExperts):
        pass

    config = Qwen3MoeConfig(hidden_size=24, moe_intermediate_size=20, num_experts=4)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    layer = Layer(config).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(16, 24, device=device, requires_grad=True)
    weights, index = torch.randn(16, 4, device=device).softmax(-1).topk(2)
    leaves = [x, *layer.parameters()]

    def run():
        out = layer(x, index, weights)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    eager = run()
    mapping = {"Experts": {device: kernels.LocalLayerRepository(repo, layer_name="Experts")}}
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(layer, mode=mode, device=device, use_fallback=False)
    assert layer.forward.__func__.__module__.startswith("_fastmoe_")
    for got, want in zip(run(), eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# Our loader


def test_bundled_is_the_default(monkeypatch):
    monkeypatch.delenv("HF_MOE_EP_KERNEL", raising=False)
    assert load() is bundled


def test_path(repo, monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(repo))
    assert_equals_bundled(load())


def test_path_of_one_variant(repo, monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(variant_here(repo)))
    assert Path(load().__file__).parent == variant_here(repo)


def test_hub_name_that_local_kernels_redirects(repo, monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_KERNEL", "hub")
    monkeypatch.setenv("HF_MOE_EP_KERNEL_REPO", "someone/fastmoe")
    monkeypatch.setenv("LOCAL_KERNELS", f"other/kernel=/nowhere:someone/fastmoe={repo}")
    assert Path(load().__file__).parent == variant_here(repo)


def test_hub_downloads_the_pinned_version_and_trusts_nobody_for_the_user(repo, monkeypatch):
    calls = []

    def install_kernel(repo_id, **options):
        calls.append((repo_id, options.pop("version")))
        assert set(options) == {"local_files_only"}
        return variant_here(repo)

    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.delenv("HF_MOE_EP_KERNEL_REPO", raising=False)
    monkeypatch.setenv("HF_MOE_EP_KERNEL", "hub")
    monkeypatch.setattr(kernels, "install_kernel", install_kernel)
    assert Path(load().__file__).parent == variant_here(repo)
    assert calls == [(kernel.HUB_REPO, kernel.HUB_VERSION)]


def test_whole_plug_in_runs_on_a_kernel_from_a_path(repo):
    """HF_MOE_EP_KERNEL=<path> in a fresh process: transformers' experts forward uses that build."""
    script = """
import torch, hf_moe_ep, sys
from hf_moe_ep import kernel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
config = Qwen3MoeConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=8, moe_intermediate_size=8,
    num_experts=4, num_experts_per_tok=2)
model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="fastmoe")
ids = torch.arange(12).view(1, 12)
model(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
assert "fastmoe" not in sys.modules
print(kernel.get_kernel().__file__)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600,
        env=os.environ | {"HF_MOE_EP_KERNEL": str(repo)},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.strip().splitlines()[-1]).parent == variant_here(repo)


# What it refuses


def change(variant: Path) -> str:
    with open(variant / "backends/torch_ops.py", "a") as file:
        file.write("\n")
    return "backends/torch_ops.py"


def add(variant: Path) -> str:
    (variant / "extra.py").write_text("")
    return "extra.py"


def remove(variant: Path) -> str:
    (variant / "configs/h200.json").unlink()
    return "configs/h200.json"


@pytest.mark.parametrize("tamper", [change, add, remove])
def test_tampered_file_is_refused_by_name(repo, monkeypatch, tamper):
    name = tamper(variant_here(repo))
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(repo))
    with pytest.raises(ValueError, match=f"was changed.*{name}"):
        load()


def test_tampered_download_is_refused(repo, monkeypatch):
    change(variant_here(repo))
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setenv("HF_MOE_EP_KERNEL", "hub")
    monkeypatch.setattr(kernels, "install_kernel", lambda *a, **k: variant_here(repo))
    with pytest.raises(ValueError, match="torch_ops.py"):
        load()


def test_build_without_digest_is_refused(repo, monkeypatch):
    path = variant_here(repo) / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["digest"]
    path.write_text(json.dumps(metadata))
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(repo))
    with pytest.raises(ValueError, match="no digest"):
        load()


def plant_bytecode(variant: Path) -> None:
    """A __pycache__ entry for gates.py that Python takes for current, and that raises."""
    from importlib import _bootstrap_external

    source = variant / "gates.py"
    code = compile("raise RuntimeError('planted bytecode ran')", str(source), "exec")
    stat = source.stat()
    data = _bootstrap_external._code_to_timestamp_pyc(code, int(stat.st_mtime), stat.st_size)
    cached = Path(util.cache_from_source(str(source)))
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(data)


def test_planted_bytecode_is_not_run(repo, monkeypatch):
    plant_bytecode(variant_here(repo))
    with pytest.raises(RuntimeError, match="planted bytecode ran"):
        kernels.get_local_kernel(repo)  # the plant works: this is what plain loading does
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(repo))
    assert load().Gate("silu").activation == "silu"


def test_path_without_a_build(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no kernel build at .*nowhere"):
        load()


def test_without_the_kernels_package(monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_KERNEL", "hub")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(versions, "installed", lambda package: None)
    with pytest.raises(ImportError, match="kernels is not installed.*kernels>=0.17"):
        load()


def test_kernel_with_a_missing_name(repo, monkeypatch, make_variant):
    init = repo / "torch-ext/fastmoe/__init__.py"
    init.write_text(init.read_text() + "\ndel reference_experts\n")
    make_variant.make_variant(variant_here(repo).name.removeprefix("torch-"), repo / "build", repo)
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(repo))
    with pytest.raises(ImportError, match="has no reference_experts"):
        load()
