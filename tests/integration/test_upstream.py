"""upstream/: each reproduction fails on the installed release for the reason given here, and passes
with its patch applied. A reproduction that no longer fails is a workaround to remove here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(transformers.__file__).parents[1]
PATCHES = sorted(ROOT.glob("upstream/*/*.patch"))

# Test -> what its failure on the release says. A test that is missing here, or here alone, fails.
REASONS = {
    "test_accelerate_prepare[False]": "mixed torch.Tensor and DTensor",
    "test_accelerate_prepare[True]": "cannot import name 'ReplicateParallel'",
    "test_all_reduce_empty_rank": "has a graph on ranks 0 and 1: [True, False]",
    "test_auxiliary_loss_scale": "router's update with 2 accumulated batches: 1.9",
    "test_checkpoint_sharded_model": "Resuming is not supported for models sharded at load time",
    "test_compiled_method_function": "2 for its __self__: 0.0 instead of 3.0",
    "test_custom_ep_style": "a rank of two holds 4 of 4 experts",
    "test_empty_tp_plan": "has no `tp_plan`",
    "test_expert_bias_gradient[batched_mm]": "batched_mm: gate_up_proj_bias is 2.",
    "test_expert_bias_gradient[grouped_mm]": "grouped_mm: gate_up_proj_bias is 2.",
    "test_expert_gradient_factor[float16]": "mlp.experts.gate_up_proj': 0.5",
    "test_expert_gradient_factor[float64]": "mlp.experts.gate_up_proj': 0.5",
    "test_experts_implementation_flag": "--experts_implementation",
    "test_input_tokens_seen": "num_input_tokens_seen is 24 after one row of 12 tokens",
    "test_sequence_parallel_flag": "a norm got 12 of 12 tokens",
    "test_tp_gradient_accumulation": "'model.layers.0.self_attn.q_norm.weight': 2.04",
    "test_trl_flops[MiniMaxM2Config]": "'MiniMaxM2Config' object has no attribute",
    "test_trl_flops[MixtralConfig]": "'MixtralConfig' object has no attribute",
    "test_trl_flops[OlmoeConfig]": "'OlmoeConfig' object has no attribute",
    "test_trl_flops[Qwen3MoeConfig]": "Qwen3MoeConfig: 147456, counted 155904",
    "test_unknown_yaml_key": "learning_rat in the YAML file: not a word",
    "test_zaya_router_bias": "saved 0.5, loaded -1.0",
}


def test_contributing_has_a_line_for_each():
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Towards upstream")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert sorted(row[0].strip("| ") for row in rows) == [p.stem for p in PATCHES]
    for path in re.findall(r"`(hf_moe_ep/[^`]*)`", text):
        assert (ROOT / path).exists(), path


def outcomes(report: Path, *overlay: Path) -> dict[str, tuple[str, str]]:
    """Test -> ("failure" | "skipped" | ..., message) of upstream/, run in a fresh interpreter."""
    path = os.pathsep.join([*map(str, overlay), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "upstream", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, f"--junitxml={report}"], cwd=ROOT, env=environment, capture_output=True
    )
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        results = [(r.tag, r.get("message", "")) for r in case if r.tag != "system-out"]
        found[case.get("name")] = results[0] if results else ("passed", "")
    return found


def test_each_reproduction_fails_on_the_release_for_its_reason(tmp_path):
    found = outcomes(tmp_path / "report.xml")
    assert found.keys() == REASONS.keys()
    wrong = {
        name: result
        for name, result in found.items()
        if result[0] != "failure" or REASONS[name] not in result[1]
    }
    assert not wrong, f"fixed (CONTRIBUTING.md says what to remove) or failing otherwise: {wrong}"


@pytest.mark.grid
@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
def test_each_reproduction_passes_with_the_patches(tmp_path):
    overlay = tmp_path / "site-packages"
    for patch in PATCHES:
        for line in patch.read_text().splitlines():
            if line.startswith("--- a/"):
                copy_into(overlay, line.removeprefix("--- a/"))
        applied = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "-i", patch], cwd=overlay, capture_output=True, text=True
        )
        assert applied.returncode == 0, applied.stdout + applied.stderr
    found = outcomes(tmp_path / "report.xml", overlay)
    wrong = {n: r for n, r in found.items() if r[0] != "skipped" or "fixed in" not in r[1]}
    assert found.keys() == REASONS.keys()
    assert not wrong, wrong


def copy_into(overlay: Path, name: str) -> None:
    """Copies one installed file; what lies beside it and beside its folders becomes a link."""
    folder = SITE_PACKAGES
    for part in Path(name).parts:
        target = overlay / folder.relative_to(SITE_PACKAGES)
        target.mkdir(exist_ok=True)
        if folder != SITE_PACKAGES:
            for entry in folder.iterdir():
                if (target / entry.name).exists():
                    continue
                if entry.name == "__pycache__":  # a link would let patched code into the original
                    shutil.copytree(entry, target / entry.name)
                else:
                    (target / entry.name).symlink_to(entry)
        folder = folder / part
        child = overlay / folder.relative_to(SITE_PACKAGES)
        if child.is_symlink():
            child.unlink()
            if folder.is_file():
                shutil.copy(folder, child)
