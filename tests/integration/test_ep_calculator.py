"""The calculator of expert-parallel steps, against rows counted by hand and by drawing experts."""

import pytest
import torch

from benchmarks.ep_calculator import SHAPES, hit, main, step_ms, wire


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


def test_step_by_hand():
    # one token of width 1000 on each of two ranks with one expert of two each: half a row leaves
    ms = step_ms(2, 1, (1000, 1, 2, 1), inside_gb_s=1, tflop_s=1)
    assert ms["inside"] == pytest.approx(4 * 0.5 * 2000 / 1e6)  # bytes over 1e6 bytes per ms
    assert ms["compute"] == pytest.approx(18 * 1000 / 1e9)
    assert ms["across"] == 0 and ms["step"] == ms["compute"] + ms["inside"]


def test_layouts_that_do_not_fit():
    with pytest.raises(ValueError, match="ep=3: must divide 128 experts"):
        wire(3, 128, 8)
    with pytest.raises(ValueError, match="by 8 beyond a node"):
        wire(12, 96, 8)


def test_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ep_calculator", "--ep", "2", "8"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("qwen3-30b-a3b") and len(lines) == 5
    assert step_ms(2, 16384, SHAPES["qwen3-30b-a3b"])["step"] < float(lines[4].split("|")[6])
