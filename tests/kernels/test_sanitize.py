"""The sanitizer program (benchmarks/sanitize.py): its cases run, and it reads findings rightly."""

import json
import os
import sys

import pytest
import torch

from benchmarks import report, sanitize
from tests.kernels.common import DEVICE

CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}
BAD = {
    "memcheck": """========= Invalid __global__ write of size 16 bytes
=========     at up_gate_kernel+0x3c40 in gated.py:91
=========     by thread (3,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error""",
    "racecheck": """========= Warning: Race between Write access at weight_grad_kernel+0x810
=========     and Read access at weight_grad_kernel+0x990 [16 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)""",
}
ENVIRONMENT = {"device": "test", "driver": None, "packages": {}, "date": "2026-11-22"}
ENVIRONMENT |= {"commit": "-", "command": "-"}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on PATH that prints what it is given, and a GPU behind it."""

    def install(outputs: dict[str, str], status: int = 0):
        script = f"#!{sys.executable}\nimport sys\nprint({outputs!r}[sys.argv[2]])\n"
        path = tmp_path / "compute-sanitizer"
        path.write_text(f"{script}sys.exit({status})\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install


@pytest.mark.parametrize("name", sanitize.NAMES)
def test_the_cases_run(name):
    sanitize.run_case(name, DEVICE)


@pytest.mark.parametrize("tool_name", sanitize.TOOLS)
def test_findings_are_counted_by_kernel(tool, tool_name):
    tool(CLEAN)
    row = sanitize.under(tool_name, 60)
    assert (row["errors"], row["warnings"], row["kernels"]) == (0, 0, {})
    tool(BAD, status=1)
    row = sanitize.under(tool_name, 60, sanitize.NAMES[:2])
    assert row["errors"] + row["warnings"] == 2 and row["kernels"]  # one in each case


def test_a_run_that_broke_off_is_no_clean_run(tool):
    tool(CLEAN, status=255)
    with pytest.raises(RuntimeError, match="memcheck did not run"):
        sanitize.under("memcheck", 60)
    tool({"memcheck": "========= Error: Device not supported"})
    with pytest.raises(RuntimeError, match="Device not supported"):
        sanitize.under("memcheck", 60)


def test_a_case_that_does_not_end_is_named(tool, tmp_path):
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "compute-sanitizer").chmod(0o755)
    with pytest.raises(RuntimeError, match="racecheck of exchange did not end in 1 s"):
        sanitize.under("racecheck", 1, ["exchange"])


def test_a_warning_fails_the_command(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "_compile", lambda names, tool: None)
    monkeypatch.setattr(report, "describe", lambda *a: ENVIRONMENT)
    monkeypatch.setattr(report, "device_slug", lambda device: "test")
    tool({**CLEAN, "racecheck": BAD["racecheck"]})
    assert sanitize.main(["--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "sanitize-test.json").read_text())["rows"]
    assert [r["warnings"] for r in rows] == [0, len(sanitize.NAMES)]
    assert f"`weight_grad_kernel` {2 * len(sanitize.NAMES)}" in capsys.readouterr().out
    tool(CLEAN)
    assert sanitize.main(["--out", str(tmp_path), "--tools", "memcheck"]) == 0
