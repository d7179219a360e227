"""`hf-moe-ep demo` with a few small steps: what it writes, and that its verdict can say no."""

import dataclasses
import json
import math
import socket

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    assert numbers["verdict"]["all_steps"] == largest < 1e-5
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


def pair(*apart):
    """Two runs whose losses differ by `apart`."""
    losses = [5.0 - 0.1 * step for step in range(len(apart))]
    others = [a + b for a, b in zip(losses, apart, strict=True)]
    return tuple(
        Run(name, curve, [1.0] * len(apart))
        for name, curve in (("eager", losses), ("fastmoe", others))
    )


@pytest.mark.parametrize(
    ("apart", "where"),
    [
        ([1e-6, 5e-5, *[0.0] * 8, 5e-3], None),
        ([1e-6, -5e-5, *[0.0] * 8, -5e-3], None),
        ([2e-5, 0.0], "at step 1"),
        ([0.0, 0.0, -2e-4], "within the first 10 steps"),
        ([*[0.0] * 10, 2e-2, 0.0], "at step 11"),
        ([*[0.0] * 10, 0.0, math.nan], "at step 12"),
        ([math.nan, 0.0], "at step 1"),
    ],
)
def test_verdict(apart, where):
    verdict = report.judge(settings.CPU, *pair(*apart))
    if where is None:
        assert verdict.problem is None
        assert verdict.all_steps == pytest.approx(5e-3)
        assert verdict.at_step == 11
    else:
        assert f" apart {where}, " in verdict.problem
        assert "That is NOT float noise" in run.conclusion(settings.CPU, verdict)


def test_curves_that_differ_end_in_failure(monkeypatch, tmp_path):
    """The exit status follows the verdict: with bounds that no difference can meet, it is 1."""
    none = settings.Bounds(first_step=-1.0, first_steps=-1.0, all_steps=-1.0)
    small = dataclasses.replace(settings.CPU, layers=1, hidden=32, steps=1, batch=1, bounds=none)
    monkeypatch.setattr(report, "plot", lambda *a: None)
    assert run.demo(small, tmp_path, "test") == 1


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
