"""The generation, router and optimizer benchmarks: at a tiny size, and with wrong code."""

import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from benchmarks import bench_generate, bench_optimizer, bench_router, report
from benchmarks.bench_sequence import TINY as TINY_SIZES

TINY = ["--prompt", "4", "--new", "3", "--batches", "1,2", "--rounds", "1"]


def run(program, folder, *argv):
    status = program.main([*argv, "--out", str(folder)])
    (path,) = folder.iterdir()
    return status, json.loads(path.read_text())


def test_generate_times_what_is_right(tmp_path, fastmoe_calls):
    status, result = run(bench_generate, tmp_path, *TINY)
    assert status == 0
    rows = {(r["batch"], r["cache"], r["implementation"]): r for r in result["rows"]}
    both, all_three = ("fastmoe", "grouped_mm"), ("fastmoe", "grouped_mm", bench_generate.KEPT)
    assert set(rows) == (
        {(b, "dynamic", n) for b in (1, 2) for n in all_three} | {(1, "static", n) for n in both}
    )
    for row in rows.values():
        assert row["tokens_per_s"] == row["batch"] * 3 / row["seconds"][0]
    assert 0 < rows[1, "static", "fastmoe"]["logits_error"] <= 1e-5
    # Three batches and caches, two calls each, of a prompt and two more tokens in two layers.
    assert len(fastmoe_calls) == 3 * 2 * 3 * 2
    assert "| 1 | 4 | 3 | static | **fastmoe** |" in report.table(result)


@pytest.mark.parametrize(
    ("name", "decoding"),
    [("fastmoe", "fastmoe"), ("grouped_mm", "batched_mm"), (bench_generate.KEPT,) * 2],
)
def test_what_generate_decodes_by_off_the_cpu(name, decoding):
    config = Qwen3MoeConfig(num_hidden_layers=1, **TINY_SIZES)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation=name)
    with model._optimize_model_for_decode():
        assert model.get_experts_implementation() == {"": decoding}
    assert model.get_experts_implementation() == {"": name}


def decoding_wrong(self, x, ids, weights, routing=None):
    out = grouped_mm_experts_forward(self, x, ids, weights)
    return out * 1.01 if len(x) == 1 else out


def test_wrong_decoding_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "fastmoe", decoding_wrong)
    status, result = run(bench_generate, tmp_path, *TINY, "--batches", "1")
    assert status == 1
    for row in result["rows"]:
        assert ("wrong" in row) == (row["implementation"] == "fastmoe") != ("tokens_per_s" in row)
    assert "fastmoe: wrong, so not timed: logits: error" in report.table(result)


def test_router_and_what_is_around_the_experts(tmp_path):
    status, result = run(bench_router, tmp_path)
    assert status == 0
    rows = {r["part"]: r for r in result["rows"]}
    assert set(rows) == {*bench_router.PARTS, "around the experts"}
    assert all(rows[p]["step_ms"] > 0 for p in bench_router.PARTS)
    assert rows["decoder layer"]["share"] == {"forward": 1.0, "step": 1.0}


def test_optimizer_times_what_is_right(tmp_path, monkeypatch, capsys):
    status, result = run(bench_optimizer, tmp_path / "right", "--seconds", "0.05")
    assert status == 0 and result["error"] < bench_optimizer.BOUND
    assert [r["implementation"] for r in result["rows"]] == ["fastmoe", "torch"] * 3
    for row in result["rows"]:
        bytes_ = bench_optimizer.BYTES[row["pass"]] * result["weights"]
        assert row["gbs"] == pytest.approx(bytes_ / row["time"]["median_ms"] / 1e6)
    assert f"{result['weights']:,} weights" in report.table(result)

    class Wrong(bench_optimizer.AdamW):
        def __init__(self, params, **how):
            super().__init__(params, **how | {"betas": (0.8, 0.999)})

    monkeypatch.setattr(bench_optimizer, "AdamW", Wrong)
    assert bench_optimizer.main(["--out", str(tmp_path / "wrong")]) == 1
    assert "differ" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def test_shares_by_hand():
    measured = {
        name: {"forward_ms": forward, "step_ms": step}
        for name, forward, step in (
            ("decoder layer", 10.0, 30.0), ("sparse block", 5.0, 12.0),
            ("experts", 4.0, 11.4), ("router", 0.5, 0.5),
        )
    }  # fmt: skip
    row = bench_router.rows_of(measured)[-1]
    assert (row["part"], row["forward_ms"], row["share"]["forward"]) == (
        "around the experts",
        1.0,
        0.1,
    )
    assert row["share"]["step"] == pytest.approx(0.02)
