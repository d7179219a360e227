"""The whole-model benchmark at a tiny size: a case of one process and of two, and cases that fail
beside one that does not."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_sft, report

STEPS = ["--steps", "2"]


def result(folder, group: str) -> dict:
    return json.loads((folder / f"sft-{group}-cpu.json").read_text())


def check(row: dict, tokens: int) -> None:
    assert row["tokens_per_step"] == tokens and row["layers"] == 2
    step = row["step"]
    assert 0 < step["p10_ms"] <= step["median_ms"] <= step["p90_ms"] and step["rounds"] == 2
    assert row["tokens_per_s"] == pytest.approx(tokens / step["median_ms"] * 1e3)
    assert row["mean_loss"] == pytest.approx(6.25, abs=0.1)  # ln(512): nothing learnt yet


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA: real sizes")
def test_a_case_is_measured_and_others_may_fail(tmp_path, capsys, monkeypatch):
    cases = {
        "late": bench_sft.Case("never ready", bench_sft.SETTINGS, limit_s=0.1),
        "fastmoe": replace(bench_sft.GROUPS["one_gpu"]["fastmoe"], limit_s=280),
    }
    monkeypatch.setitem(bench_sft.GROUPS, "one_gpu", cases)
    assert bench_sft.main(["one_gpu", *STEPS, "--out", str(tmp_path), "--commit", "abc"]) == 1
    found = result(tmp_path, "one_gpu")
    late, good = found["rows"]
    assert late["error"].startswith("no result within 0.1 s")
    check(good, tokens=4 * 64)
    assert found["environment"]["commit"] == "abc" and found["environment"]["packages"]["trl"]
    assert report.table(found) in capsys.readouterr().out


def test_a_rank_that_fails_ends_the_case(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")  # exit status 1
    ranks = bench_sft.Ranks(2, "case", tmp_path, tmp_path)
    done = ranks.train({"result": str(tmp_path / "row.json")}, limit_s=60)
    assert done["error"] in [f"rank {rank} failed: it said nothing" for rank in range(2)]
    assert done["seconds"] < 30


@pytest.mark.grid
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA: real sizes")
@pytest.mark.parametrize("group", ["ep", "recipes"])
def test_two_ranks(tmp_path, group):
    assert bench_sft.main([group, *STEPS, "--out", str(tmp_path)]) == 0
    rows = {row["case"]: row for row in result(tmp_path, group)["rows"]}
    if group == "ep":
        check(rows["theirs"], tokens=2 * 4 * 64)
        check(rows["ours"], tokens=2 * 4 * 64)
        # The same weights and data: only the way of the tokens differs.
        assert rows["ours"]["mean_loss"] == pytest.approx(rows["theirs"]["mean_loss"], abs=1e-5)
    else:
        check(rows["ep_fsdp"], tokens=2 * 4 * 64)
        check(rows["long_context"], tokens=512)


@pytest.mark.parametrize(("norm", "wrong"), [(1.04, False), (1.06, True), (0.94, True)])
def test_a_case_that_trains_otherwise_is_wrong(norm, wrong):
    first = {"case": "first", "logged": {"grad_norm": 1.0}}
    assert ("wrong" in bench_sft.compare({"logged": {"grad_norm": norm}}, first)) == wrong
    assert not bench_sft.compare({"error": "no result"}, first)


def test_what_there_is_not(capsys):
    for what, message in (("two_gpu", "no group"), ("ep:their", "no case of ep")):
        with pytest.raises(SystemExit):
            bench_sft.main([what])
        assert message in capsys.readouterr().err
