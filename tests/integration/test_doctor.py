"""`hf-moe-ep doctor`: what it reports, and that every kind of problem changes its exit status."""

from __future__ import annotations

import json

import pytest
import torch

from hf_moe_ep import kernel, versions
from hf_moe_ep.cli import doctor


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("WORLD_SIZE", "HF_MOE_EP_KERNEL", "HF_MOE_EP_KERNEL_REPO", "LOCAL_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)


@pytest.fixture
def report(capsys):
    """Runs the doctor with --json; returns (exit status, problems, all checks by name)."""

    def run(*argv):
        status = doctor.main([*argv, "--json"])
        out = json.loads(capsys.readouterr().out)
        problems = [c for c in out["checks"] if c["status"] == "problem"]
        assert out["ok"] == (not problems) and status == (1 if problems else 0)
        return status, problems, {c["name"]: c for c in out["checks"]}

    return run


@pytest.fixture
def model(tmp_path):
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=8, num_experts=6,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def only(problems, text):
    assert len(problems) == 1 and text in problems[0]["detail"], problems


def test_supported_machine(report):
    status, _, checks = report()
    assert status == 0
    assert {"python", *versions.REQUIRED, *versions.OPTIONAL, "triton", "source"} <= checks.keys()
    assert versions.installed("torch") in checks["torch"]["detail"]
    assert checks["source"]["detail"].startswith("bundled: ")
    assert checks["experts_implementation"]["status"] == "ok"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_backend_is_the_one_the_kernels_use(report, dtype):
    _, _, checks = report()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = kernel.get_kernel().backend_name(torch.empty(0, dtype=dtype, device=device))
    assert checks[str(dtype).removeprefix("torch.")]["detail"].startswith(f"{backend} for ")


def test_old_gpu_is_told_why_it_gets_no_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    reason = doctor.backend_reason("torch", torch.device("cuda"))
    assert "7.5" in reason and "needs 8.0" in reason


def test_text_output(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "versions: torch" in out and out.endswith("No problems found.\n")
    assert doctor.main(["--ep_size", "3", "--fsdp_size", "4"]) == 1
    assert capsys.readouterr().out.endswith("1 problem(s)\n")


@pytest.mark.parametrize("package", ["transformers", "trl"])
def test_version_out_of_range(report, monkeypatch, package):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda p: "99.0" if p == package else real(p))
    _, problems, _ = report()
    only(problems, f"{package} 99.0 is not supported")


def test_missing_optional_package_is_no_problem(report, monkeypatch):
    real = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda p: None if p in ("trl", "kernels") else real(p)
    )
    status, _, checks = report()
    assert status == 0 and "not installed" in checks["trl"]["detail"]


def test_kernel_that_does_not_load(report, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MOE_EP_KERNEL", str(tmp_path))
    monkeypatch.setattr(kernel, "get_kernel", kernel.get_kernel.__wrapped__)
    _, problems, _ = report()
    only(problems, "no kernel build at")


# Layouts


@pytest.mark.parametrize(
    ("argv", "mesh"),
    [
        ("--ep_size 4 --world_size 8", "fsdp 8, tp 1; experts: ep 4, efsdp 2; 8 processes"),
        ("--tp_size 2 --world_size 8", "fsdp 4, tp 2; experts: ep 1, efsdp 8; 8 processes"),
        ("--ep_size 8 --tp_size 2", "fsdp 4, tp 2; experts: ep 8, efsdp 1; 8 processes"),
        ("--tp_size 2", "fsdp 1, tp 2; experts: ep 1, efsdp 2; 2 processes"),
        (
            "--ep_size 2 --dp_replicate_size 2 --world_size 8",
            "dp_replicate 2, fsdp 4, tp 1; experts: ep 2, efsdp 2; 8 processes",
        ),
    ],
)
def test_fsdp_takes_the_processes_that_are_left(report, argv, mesh):
    status, _, checks = report(*argv.split())
    assert status == 0 and checks["mesh"]["detail"].endswith(mesh)


def test_sizes_that_do_not_fit_together(report):
    _, problems, _ = report("--ep_size", "4", "--fsdp_size", "6")
    only(problems, "ep_size=4, fsdp_size=6: `ep_size` must divide")


def test_wrong_number_of_processes(report, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    _, problems, _ = report("--ep_size", "4", "--fsdp_size", "4")
    only(problems, "6 processes, but the layout needs 4")
    assert report("--ep_size", "4", "--fsdp_size", "4", "--world_size", "4")[0] == 0


def test_model_that_fits(report, model):
    status, _, checks = report("--ep_size", "3", "--fsdp_size", "3", "--model", model)
    assert status == 0
    assert checks["experts"]["detail"] == "6 over ep_size=3: 2 each"


def test_experts_that_do_not_divide(report, model):
    _, problems, _ = report("--ep_size", "4", "--fsdp_size", "4", "--model", model)
    only(problems, "6 do not divide by ep_size=4; choose ep_size among [1, 2, 3, 6]")


def test_heads_that_do_not_divide(report, model):
    _, problems, _ = report("--tp_size", "4", "--model", model)
    only(problems, "2 do not divide by tp_size=4")


def test_model_without_experts(report, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    _, problems, _ = report("--model", str(tmp_path))
    only(problems, "LlamaForCausalLM has no experts")


def test_model_that_is_not_there(report, tmp_path):
    _, problems, _ = report("--model", str(tmp_path / "nowhere"))
    only(problems, "cannot be read")


# Others that would shard the model


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"])
def test_launcher_that_shards_too(report, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert report()[0] == 0  # no layout: nothing to collide with
    _, problems, _ = report("--ep_size", "2", "--fsdp_size", "2")
    only(problems, f"ACCELERATE_USE_{name} is on")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    assert report("--ep_size", "2", "--fsdp_size", "2")[0] == 0


def test_installed_deepspeed_is_mentioned(report, monkeypatch):
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda p: "0.19.8" if p == "deepspeed" else real(p))
    status, _, checks = report("--ep_size", "2", "--fsdp_size", "2")
    assert status == 0 and "AutoEP" in checks["deepspeed"]["detail"]


def test_unknown_flag_is_refused():
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--expert_size", "2"])
    assert stop.value.code == 2
