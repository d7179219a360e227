"""The random problems (benchmarks/random_problems.py): what they reach, and that they find faults.

On a CPU a few of them; a thousand belong to a GPU.
"""

import dataclasses
import json

import pytest
import torch

import fastmoe
from benchmarks import random_problems
from benchmarks.problems import make_inputs
from benchmarks.random_problems import POOL, check, draw
from fastmoe import tuning
from tests.kernels.common import DEVICE


def test_a_thousand_seeds_reach_every_layout_and_row_tile():
    """And tokens without experts, no tokens, and one token of one expert."""
    problems = [draw(seed, "cuda")[0] for seed in range(1000)]
    reached = {(p.name, tuning.bucket(p.T * p.K, p.E)) for p in problems}
    assert reached == {(p.name, b) for _, p in POOL for b in tuning.BUCKETS}
    assert {p.routing for p in problems} == {"random", "one_expert", "few_experts"}
    assert {0, 1} <= {p.T for p in problems} and {0.0, 1.0} <= {p.sentinels for p in problems}
    assert all(p.K <= p.E for p in problems)
    assert draw(17, "cuda") == draw(17, "cuda") != draw(17 + len(POOL), "cuda")


@pytest.mark.parametrize("seed", range(len(POOL)), ids=lambda s: POOL[s][1].name)
def test_fused_experts_pass(seed):
    assert not check(seed, DEVICE).objections


def unwritten_row(*args, **kwargs):
    out = fastmoe.fused_experts(*args, **kwargs)
    return out.index_copy(0, torch.tensor([0], device=out.device), torch.empty_like(out[:1]))


def weak_down_gradient(x, ids, weights, up, down, **kwargs):
    down = down * 0.75 + (down * 0.25).detach()  # the same values
    return fastmoe.fused_experts(x, ids, weights, up, down, **kwargs)


def changing(x, *args, **kwargs):
    changing.calls += 1
    eps = torch.finfo(x.dtype).eps
    return fastmoe.fused_experts(x, *args, **kwargs) * (1 + changing.calls % 2 * 2 * eps)


changing.calls = 0
WRONG = {unwritten_row: "output: norm error nan", weak_down_gradient: "down: norm error 0.25",
         changing: "output: other bits"}  # fmt: skip


@pytest.mark.parametrize("spoiled", WRONG, ids=lambda f: f.__name__)
def test_a_fault_is_found(spoiled):
    seed = next(s for s in range(0, 1000, len(POOL)) if draw(s, DEVICE)[0].T > 8)
    objections = check(seed, DEVICE, experts=spoiled).objections
    assert any(line.startswith(WRONG[spoiled]) for line in objections), objections


CLAMPED = next(i for i, (_, p) in enumerate(POOL) if p.gate == "clamped")


def clamped_elsewhere(x, ids, weights, up, down, gate, **kwargs):
    """Nearer than rounding to the limit, and far from it: allowed, and not."""
    limit = gate.limit * (1 + clamped_elsewhere.by)
    return fastmoe.fused_experts(
        x, ids, weights, up, down, gate=dataclasses.replace(gate, limit=limit), **kwargs
    )


@pytest.mark.parametrize(("by", "found"), [(1e-9, False), (0.05, True)])
def test_a_value_on_the_clamp_may_fall_on_either_side(by, found):
    clamped_elsewhere.by = by
    seed = next(s for s in range(CLAMPED, 1000, len(POOL)) if draw(s, DEVICE)[0].T > 8)
    assert bool(check(seed, DEVICE, experts=clamped_elsewhere).objections) == found


def test_values_on_the_clamp_change_gradients_alone():
    problem = dataclasses.replace(POOL[CLAMPED][1], T=64, E=8)
    inputs = make_inputs(problem, torch.float32, "cpu", 0)
    truth = random_problems._run(fastmoe.reference_experts, problem, inputs, torch.float64)
    changes = random_problems._on_clamp(problem, inputs, truth, torch.bfloat16)
    assert changes.keys() == {"x", "up", "up_bias"}
    assert all(0 < e.norm < 0.2 and e.norm < e.worst for e in changes.values())
    assert not random_problems._on_clamp(POOL[0][1], inputs, truth, torch.bfloat16)


def test_failing_problems_are_in_the_result_and_the_status(tmp_path, monkeypatch, capsys):
    def crashes(seed, device):
        if seed == 5:
            raise RuntimeError("out of luck")
        return check(seed, device)

    monkeypatch.setattr(random_problems, "check", crashes)
    args = ["--workers", "1", "--out", str(tmp_path)]
    assert random_problems.main(["--count", "3", "--first", "5", *args]) == 1
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN
    assert (result["problems"], result["passed"]) == (3, 2)
    (failure,) = result["failures"]
    assert failure["seed"] == 5 and failure["objections"] == ["RuntimeError: out of luck"]
    assert "2 of 3 problems passed" in capsys.readouterr().out
    assert random_problems.main(["--count", "1", "--first", "6", *args]) == 0
