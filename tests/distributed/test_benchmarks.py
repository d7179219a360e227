"""The benchmarks of several ranks at tiny sizes, started as a user starts them: not what they
measure, but that they end well and write what the tables read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import table

ROOT = Path(__file__).resolve().parents[2]


def result_of(module: str, out: Path, *options: str, ranks: int = 2) -> dict:
    """The result of one benchmark; its table has been made."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launch, "-m", f"benchmarks.{module}", "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    table(result)
    return result


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.grid)])
def test_upkeep(tmp_path, ranks):
    options = ("--rounds", "2", "--micro_batches", "1")
    result = result_of("bench_upkeep", tmp_path, *options, ranks=ranks)
    check, at_once, later = result["rows"]
    assert check["check_ms"] > 0 and check["share"] > 0
    assert not at_once["asynchronous"] and at_once["there_after_ms"] >= at_once["stall_ms"] > 0
    assert later["asynchronous"] and later["steps_meanwhile_ms"]
    assert later["gib"] == at_once["gib"] > 0


@pytest.mark.grid
def test_stability(tmp_path):
    sizes = ("--small", "--layers", "1", "--tokens", "128", "--steps", "24")
    result = result_of("stability", tmp_path, *sizes)
    assert [len(row["loss"]) for row in result["rows"]] == [24, 24]
    assert result["first_steps_differ_by"] < 0.02


@pytest.mark.grid
def test_the_longest_sequence_ends_with_its_time(tmp_path):
    options = ("--tokens", "64,128", "--rounds", "2", "--warm_up", "1", "--longest", "2")
    result = result_of("bench_sequence", tmp_path, *options)
    steps = [step["T"] for step in result["longest"]["steps"]]
    assert steps[:3] == [64, 128, 256] and result["longest"]["ended_by"] == "seconds"
