"""The counters program (benchmarks/counters.py) reads nvidia-smi and ncu rightly, or says so."""

import pytest

from benchmarks import counters, report

ENVIRONMENT = {"device": "test", "driver": None, "packages": {}, "date": "2026-11-23", "cuda": "13"}
ENVIRONMENT |= {"commit": "-", "command": "-"}
KERNEL = {"ms": 1.2e6, "clock": 1.5e9, "busy": 950.0, "cycles": 1000.0}
KERNEL |= {"tensor": 91.3, "l2": 74.0, "memory": "1,030.5"}


def table(units):
    names, values = zip(*KERNEL.items(), strict=True)
    columns = ["ID", "Kernel Name", *(counters.COUNTERS[n] for n in names)]
    lines = [
        columns,
        ["", "", *(units.get(n, "%") for n in names)],
        ["0", "up_gate_kernel", *values],
    ]
    return [",".join(f'"{cell}"' for cell in line) for line in lines]


def test_a_kernel_of_ncu():
    (row,) = counters.rows_of(table({"ms": "ns", "clock": "hz"}))
    assert row["kernel"] == "up_gate_kernel"
    assert row["ms"] == pytest.approx(1.2) and row["clock_mhz"] == pytest.approx(1500)
    assert row["occupied"] == 0.95 and row["tensor"] == pytest.approx(0.913)
    assert row["memory"] == pytest.approx(10.305)


def test_lines_of_nvidia_smi():
    lines = ["1545, 1980, 698.21, 700.00, Active", "1500, 1980, 702.00, 700.00, Not Active"]
    found = counters.answers([*lines, lines[0]])
    assert found["clock_mhz"] == 1545 and found["power_limit_w"] == 700
    assert found["limited_by_power"] == pytest.approx(2 / 3)
    with pytest.raises(RuntimeError, match="[Not Supported]"):
        counters.answers(["1545, 1980, [Not Supported], 700.00, Active"])
    with pytest.raises(RuntimeError, match="nothing"):
        counters.answers([])


def test_the_table_has_steps_and_kernels():
    step = dict(implementation="fastmoe", T=16384, kernel=None, ms=6.4, clock_mhz=1545.0)
    step |= dict(highest_clock_mhz=1980.0, power_w=698.2, power_limit_w=700.0, limited_by_power=1.0)
    (kernel,) = counters.rows_of(table({"ms": "ns", "clock": "hz"}))
    rows = [step, dict(implementation="fastmoe", T=16384, **kernel)]
    result = dict(mode="counters", dtype="bfloat16", rows=rows, environment=ENVIRONMENT)
    text = report.table(result)
    assert "| **fastmoe** | 16384 | 6.40 | 1545 of 1980 | 698 of 700 | 100% |" in text
    assert "| 16384 | `up_gate_kernel` | 1200 | 1500 | 95% | 91% | 74% | 1030% |" in text


def test_ncu_that_may_not_read_is_said(tmp_path, monkeypatch):
    (tmp_path / "ncu").write_text("#!/bin/sh\necho ==ERROR== ERR_NVGPUCTRPERM\nexit 1\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        counters.counted(64, 10)
