"""`hf-moe-ep demo` with a few small steps: what it writes, and that its verdict can say no."""

import dataclasses
import json
import math
import socket

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_ep.cli.demo import data, report, run, settings
from hf_moe_ep.cli.demo.train import Run

STEPS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(exit status, output folder) of a demo that may open no connection to another machine."""

    def refuse(self, address):
        raise AssertionError(f"the demo opened a connection to {address}")

    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        argv = ["--output", str(output), "--steps", str(STEPS), "--batch", "1", "--device", "cpu"]
        return run.main(argv), output


@pytest.fixture(scope="module")
def numbers(finished):
    return json.loads((finished[1] / "demo.json").read_text())


def test_succeeds(finished):
    assert finished[0] == 0


def test_numbers(numbers):
    assert [r["implementation"] for r in numbers["runs"]] == ["eager", "fastmoe"]
    for r in numbers["runs"]:
        assert len(r["losses"]) == len(r["seconds"]) == STEPS
        assert r["step_seconds"] > 0
        # Untrained: about ln(vocabulary), plus what the spread of the initial logits adds.
        assert r["losses"][0] == pytest.approx(math.log(settings.CPU.vocab), abs=1.0)
    eager, fast = (r["losses"] for r in numbers["runs"])
    largest = max(abs(a - b) for a, b in zip(eager, fast, strict=True))
    assert numbers["verdict"]["loss"] == largest < 1e-5
    assert 0 < numbers["verdict"]["gradient"] < 1e-5
    assert numbers["verdict"]["problem"] is None
    assert numbers["reloaded_weights_equal"]


def test_provenance(numbers):
    assert numbers["command"].startswith("hf-moe-ep demo --output ")
    assert numbers["device"].startswith("CPU (")
    assert numbers["backend"] == "torch"
    assert numbers["versions"]["torch"] == torch.__version__
    assert numbers["settings"]["steps"] == STEPS
    assert numbers["commit"] is None or len(numbers["commit"].split("+")[0]) == 40


def test_saved_model_is_complete(finished, numbers):
    model = AutoModelForCausalLM.from_pretrained(finished[1] / "model")
    assert model.num_parameters() == numbers["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(finished[1] / "model")
    text = data.documents()[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert numbers["sample"].startswith(run.PROMPT)


def test_plot_shows_both_curves(finished):
    image = Image.open(finished[1] / "loss.png").convert("RGB")
    colors = {color for _, color in image.getcolors(image.width * image.height)}
    assert {(0xF2, 0xB1, 0x34), (0x0B, 0x4F, 0x6C), (0xC0, 0x39, 0x2B)} <= colors


def pair(*apart, gradient=0.0):
    """Two runs whose losses differ by `apart`, and their gradients, (3, 4), by `gradient`."""
    losses = [5.0 - 0.1 * step for step in range(len(apart))]
    others = [a + b for a, b in zip(losses, apart, strict=True)]
    return tuple(
        Run(name, curve, [1.0] * len(apart), gradients={"w": torch.tensor([3.0, 4.0 + off])})
        for name, curve, off in (("eager", losses, 0.0), ("fastmoe", others, gradient))
    )


@pytest.mark.parametrize(
    ("apart", "gradient", "problem"),
    [
        ([1e-6, 0.0, 1.9e-2], 0.2, None),
        ([1e-6, 0.0, -1.9e-2], -0.2, None),
        ([1e-6, 0.0, 2.1e-2], 0.2, "losses at step 3 of eager and fastmoe are 2.1e-02 apart"),
        ([1e-6, -2.1e-2, 0.0], 0.2, "losses at step 2 of eager and fastmoe are 2.1e-02 apart"),
        ([0.0, math.nan, 0.0], 0.2, "losses at step 2 of eager and fastmoe are inf apart"),
        ([0.0, 0.0, 0.0], 0.3, "gradients at step 1 of eager and fastmoe are 6.0e-02 apart"),
        ([0.0, 0.0, 0.0], math.nan, "gradients at step 1 of eager and fastmoe are nan apart"),
    ],
)
def test_verdict(apart, gradient, problem):
    verdict = report.judge(settings.CPU, *pair(*apart, gradient=gradient))
    if problem is None:
        assert verdict.problem is None
        assert verdict.gradient == pytest.approx(0.2 / 5)
        assert (verdict.loss, verdict.at_step) == (pytest.approx(1.9e-2), 3)
        assert "That is float noise" in run.conclusion(settings.CPU, verdict)
    else:
        assert problem in verdict.problem
        assert "That is NOT float noise" in run.conclusion(settings.CPU, verdict)


def test_a_lost_gradient_is_noticed(monkeypatch, tmp_path, capsys):
    """The whole demo with a fastmoe that keeps the router from learning: same forward, exit 1."""
    real = ALL_EXPERTS_FUNCTIONS["fastmoe"]

    def broken(self, hidden_states, top_k_index, top_k_weights):
        return real(self, hidden_states, top_k_index, top_k_weights.detach())

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "fastmoe", broken)
    small = dataclasses.replace(settings.CPU, layers=2, hidden=64, steps=2, batch=2)
    assert run.demo(small, tmp_path, "test") == 1
    assert "NOT float noise: the gradients at step 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "demo.json").read_text())
    eager, fast = (r["losses"] for r in found["runs"])
    assert fast[0] == pytest.approx(eager[0], abs=1e-5)


def test_table():
    eager, fast = pair(*[1e-6] * 12)
    eager.seconds[:] = [9.0] + [2.0] * 11  # the first is left out
    fast.mfu, eager.mfu = [0.5], [0.25]
    lines = report.table(settings.CPU, eager, fast).splitlines()
    assert lines[1].split() == "loss at step 1 5.0000 5.0000 difference +1.0e-06".split()
    assert [line.split()[3] for line in lines[1:8]] == ["1", "2", "4", "6", "8", "10", "12"]
    assert lines[8].split() == "step time, median 2000.0 ms 1000.0 ms 2.00x as fast".split()
    assert lines[9].split() == ["tokens/s", "512", "1,024"]
    assert lines[10].split()[:3] == ["MFU", "25.0%", "50.0%"]
