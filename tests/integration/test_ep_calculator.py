"""The calculator of expert-parallel steps, against rows counted by hand and by drawing experts, and
against what two GPUs took; and the plot of that."""

import pytest
import torch

from benchmarks.ep_calculator import (
    MEMORY_GB_S,
    gemm_tflop_s,
    hit,
    layer_ms,
    main,
    wire,
    wire_ms,
)
from benchmarks.plots import SINGLE, step_times
from benchmarks.report import load


def test_hit_by_hand():
    assert hit(1, of=2, top_k=1) == 0.5
    assert hit(2, of=4, top_k=2) == pytest.approx(5 / 6)  # 1 of 6 pairs lies wholly elsewhere
    assert hit(4, of=4, top_k=2) == 1


@pytest.mark.parametrize(("ep", "per_node"), [(2, 8), (8, 8), (16, 8), (64, 8), (8, 4)])
def test_rows_by_drawing(ep, per_node):
    experts, top_k, tokens = 128, 8, 20_000
    ids = torch.rand(tokens, experts).topk(top_k).indices
    ranks = torch.zeros(tokens, ep).scatter_(1, ids // (experts // ep), 1.0)
    nodes = ranks.view(tokens, -1, min(ep, per_node)).amax(2)
    rows = wire(ep, experts, top_k, per_node)
    # rank 0 sends rows of its own tokens to other nodes, and hands on inside its node what came
    assert rows.across == pytest.approx(nodes[:, 1:].sum(1).mean().item(), rel=0.02, abs=1e-9)
    inside = ranks.view(tokens, -1, min(ep, per_node))[:, 0, 1:].sum(1).mean().item()
    assert rows.inside == pytest.approx(inside * nodes.shape[1], rel=0.02)
    assert rows.pairs == pytest.approx(top_k * (1 - 1 / ep))


def test_wire_by_hand():
    # one token of width 1000 on each of two ranks with one expert of two each: half a row leaves
    ms = wire_ms(wire(2, 2, 1), 2000, exchanges=4, inside_gb_s=1, node_gb_s=1)
    published = 2 * 2 * 2000 / MEMORY_GB_S / 1e6  # read and written, in forward and in backward
    assert ms["inside"] == pytest.approx(4 * 0.5 * 2000 / 1e6 + published)  # 1e6 bytes per ms
    assert ms["across"] == 0


def test_speeds_are_the_measured_ones():
    rows = [r for r in load("train-nvidia-h200")["rows"] if r["implementation"] == "fastmoe"]
    row = next(r for r in rows if (r["problem"], r["T"]) == ("qwen3-30b-a3b", 16384))
    assert gemm_tflop_s("qwen3-30b-a3b", 1024) == pytest.approx(row["step_tflops"])
    low, high = (gemm_tflop_s("qwen3-30b-a3b", rows) for rows in (256, 1024))
    assert gemm_tflop_s("qwen3-30b-a3b", 640) == pytest.approx((low + high) / 2)
    assert gemm_tflop_s("qwen3-30b-a3b", 1) == low


@pytest.mark.parametrize("quantity", ["forward", "step"])
def test_against_two_gpus(quantity):
    """As measured; at 4096 tokens the GPUs wait for launches, which the calculator leaves out."""
    measured = {
        row["T"]: row[quantity]["median_ms"]
        for row in load("ep2-nvidia-h200")["rows"]
        if row["implementation"] == "symmetric" and quantity in row
    }
    assert measured.keys() == {16384, 4096}
    times = {t: ms / layer_ms(quantity, 2, t, "qwen3-30b-a3b")["sum"] for t, ms in measured.items()}
    assert 1 / 1.2 < times[16384] < 1.2, times
    assert 1 < times[4096] < 2, times


def test_layouts_that_do_not_fit():
    with pytest.raises(ValueError, match="ep=3: must divide 128 experts"):
        wire(3, 128, 8)
    with pytest.raises(ValueError, match="by 8 beyond a node"):
        wire(12, 96, 8)


def test_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ep_calculator", "--ep", "2", "16"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen3-30b-a3b") and len(lines) == 9
    small, large = ([c.strip() for c in line.split("|")[1:-1]] for line in lines[5:7])
    assert small[:2] == ["2", "64"] and large[:2] == ["16", "8"]
    step = layer_ms("step", 2, 16384, "qwen3-30b-a3b")
    assert small[5] == f"{step['sum']:.2f}" and float(large[4]) > 0 == float(small[4])


def test_plot(tmp_path):
    path = step_times(load("ep2-nvidia-h200"), tmp_path / "ep.png", SINGLE, "one GPU")
    assert path.read_bytes().startswith(b"\x89PNG")
