"""The benchmark's own parts: a gate that lets no wrong result through, fair rounds, honest tables.

Everything runs on a CPU at sizes of a few tokens; times are not judged, only how they come about.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import fastmoe
from benchmarks import (
    accumulate,
    bench_experts,
    cells,
    environment,
    first_step,
    floors,
    gate,
    kernel_times,
    layer,
    peers,
    plots,
    report,
    stability,
    timing,
)
from benchmarks.problems import EDGE, TRAINING, Problem, make_inputs

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Problem("small", 40, 32, 48, 6, 2)  # T, H, I, E, K


def settings(*names: str, dtype=torch.float32) -> layer.Settings:
    return layer.Settings(CPU, dtype, 0.01, names, None)


# --- decode ---


@pytest.mark.parametrize("sentinels", [0.0, 0.3])
def test_the_calls_of_a_graph_have_experts_of_their_own(sentinels):
    p = Problem("few", 2, 32, 16, 32, 3, sentinels=sentinels)
    inputs = make_inputs(p, torch.float32)
    layers = layer._disjoint(p, inputs)
    sets = [set(i.top_k_index.unique().tolist()) for i in layers]
    experts = [s & set(range(p.E)) for s in sets]
    assert layers[0] is inputs and len(layers) == p.E // len(experts[0]) > 1
    assert len(set.union(*experts)) == sum(map(len, experts)) == len(layers) * len(experts[0])
    assert all(s - e == sets[0] - experts[0] for s, e in zip(sets, experts, strict=True))


# --- lean experts and accumulation ---


def test_accumulation_rows_have_times_errors_and_memory():
    rows = accumulate.measure(SMALL, settings(dtype=torch.bfloat16))
    lean = next(r for r in rows if r["implementation"] == peers.LEAN)
    ours = next(r for r in rows if r["implementation"] == peers.OURS)
    assert lean["same_bits"] and lean["saved_mib"] < ours["saved_mib"] / 5
    ways = {r["way"]: r for r in rows if "way" in r}
    assert list(ways) == list(accumulate.WAYS) and all("micro_batches" in r for r in ways.values())
    assert not any(bench_experts._ours_failed(r) for r in rows)
    errors = {way: max(r["sum_errors"].values()) for way, r in ways.items() if "sum_errors" in r}
    assert errors["main_grad, fp32"] < errors["autograd"] == max(errors.values()) < 0.02


def test_a_sum_that_is_wrong_is_not_timed(monkeypatch):
    def doubled(self):
        return [2 * g if self.way == "main_grad" else g for g in right(self)]

    right = accumulate._Way.__call__
    monkeypatch.setattr(accumulate._Way, "__call__", doubled)
    rows = accumulate.measure(SMALL, settings())
    wrong = [r for r in rows if "wrong" in r]
    assert [r["way"] for r in wrong] == ["main_grad"] and "micro_batches" not in wrong[0]
    assert bench_experts._ours_failed(wrong[0])


# --- the gate ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fastmoe", "grouped_mm", "batched_mm", "eager"])
def test_right_implementations_pass_the_gate(name, dtype):
    rows, admitted = layer.admit(
        SMALL, make_inputs(SMALL, dtype), settings(name, dtype=dtype), True
    )
    assert list(admitted) == [name], rows[name]
    assert set(rows[name]["errors"]) == {"output", "x", "top_k_weights", "up", "down"}


def test_reference_is_the_eager_model_in_fp64():
    inputs = make_inputs(SMALL, torch.float64)
    errors = gate.errors(gate.run(peers.eager(SMALL), inputs), gate.reference(inputs))
    assert max(e.norm for e in errors.values()) < 1e-14


def unwritten_row(i, y):
    out = torch.empty_like(y)  # the last row is never written
    return out.index_copy(0, torch.arange(SMALL.T - 1), y[:-1])


def swapped_rows(i, y):
    return y[[1, 0, *range(2, SMALL.T)]]


def lost_router_gradient(i, y):
    return y - (i.top_k_weights - i.top_k_weights.detach()).sum()  # the same values


def weak_expert_gradient(i, y):
    return y + 0.01 * (i.up[2] - i.up[2].detach()).sum()  # the same values


WRONG = [unwritten_row, swapped_rows, lost_router_gradient, weak_expert_gradient]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
def test_wrong_results_fail_and_are_not_timed(monkeypatch, spoil, dtype):
    right = peers.grouped_mm(SMALL)
    monkeypatch.setitem(peers.IMPLEMENTATIONS, "fastmoe", lambda p: lambda i: spoil(i, right(i)))
    ours, *_ = layer.train(SMALL, settings("fastmoe", "grouped_mm", dtype=dtype))
    assert ours["wrong"] and "step" not in ours and "forward" not in ours


def test_a_peer_is_refused_only_when_rounding_does_not_explain_its_error(monkeypatch):
    right = peers.grouped_mm(SMALL)

    def off_by(factor):
        return lambda p: lambda i: right(i) * factor

    outcome = {}
    for name, factor in (("liger", 1 + 2**-6), ("fastmoe", 1 + 2**-6), ("scattermoe", 1.1)):
        monkeypatch.setitem(peers.IMPLEMENTATIONS, name, off_by(factor))
        monkeypatch.setattr(peers, "NEEDS_CUDA", ())
        bf16 = settings(name, dtype=torch.bfloat16)
        _, admitted = layer.admit(SMALL, make_inputs(SMALL, torch.bfloat16), bf16, True)
        outcome[name] = name in admitted
    assert outcome == {"liger": True, "fastmoe": False, "scattermoe": False}


def test_poison_ends_with_the_gate():
    with gate.poisoned_memory():
        assert torch.empty(8).isnan().all()
        assert (torch.empty(8, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


# --- timing and memory ---


def test_every_round_calls_each_once_in_an_order_of_its_own():
    log = []
    calls = {n: lambda n=n: log.append(n) for n in "abc"}
    spreads = timing.interleave(calls, CPU, seconds=0.0, before=lambda: log.append("-"))
    assert log[::2] == ["-"] * (len(log) // 2)  # before every call, and only then
    order = "".join(log[1::2])
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert rounds[:2] == ["abc"] * 2 and len(rounds) == 12  # warm-up, then 10 rounds
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    for name in "abc":  # nobody always follows the same neighbour
        assert len({a for a, b in itertools.pairwise(order[6:]) if b == name}) > 1
    assert {s.rounds for s in spreads.values()} == {10}


def test_spread_of_known_times():
    spread = timing.spread([float(n) for n in range(11)])
    assert (spread.median_ms, spread.p10_ms, spread.p90_ms, spread.rounds) == (5.0, 1.0, 9.0, 11)


def test_saved_memory_counts_a_storage_once_and_no_leaf_or_output():
    x = torch.randn(2**18, requires_grad=True)  # 1 MiB
    for forward, mib in (
        (lambda: x.sin(), 0.0),  # saves x
        (lambda: x.exp(), 0.0),  # saves its output
        (lambda: x.exp().sin(), 1.0),  # exp's output, saved by both
        (lambda: x.exp().sin().cos(), 2.0),  # and sin's
    ):
        assert timing.memory_of_step(forward, torch.ones_like(x), [x]) == timing.Memory(mib, None)
    assert x.grad is None


def test_ours_saves_the_up_projection_and_the_routing_only():
    """Not the down projection's output, and no permuted copy of x: each would add S*H elements."""
    problem = SMALL.at(512)
    rows = {r["implementation"]: r for r in layer.train(problem, settings("fastmoe", "grouped_mm"))}
    slots = problem.T * problem.K
    up_output = slots * 2 * problem.I * 4 / timing.MIB
    routing = slots * 32 / timing.MIB  # a few integers per slot
    assert up_output <= rows["fastmoe"]["saved_mib"] < up_output + routing
    assert rows["grouped_mm"]["saved_mib"] > up_output + 2 * slots * problem.H * 4 / timing.MIB


# --- floors ---


def test_dense_limit_has_the_problems_flops():
    from torch.utils.flop_counter import FlopCounterMode

    inputs, flops = make_inputs(SMALL, torch.float32), {}
    for quantity, call in floors.dense_limit(SMALL, inputs).items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[quantity] = counter.get_total_flops() / SMALL.flops
    assert flops == {"forward": 1.0, "frozen_step": 2.0, "step": 3.0}


def test_decode_reads_the_active_experts_once():
    inputs = replace(make_inputs(SMALL, torch.bfloat16), top_k_index=torch.tensor([[1, 4], [4, 5]]))
    assert floors.decode_bytes(SMALL, inputs) == (3, 3 * 3 * 32 * 48 * 2)


def test_bandwidth_of_this_machine():
    nbytes = 64 * 2**20
    assert 1e8 < floors.stream_bandwidth(CPU, nbytes, seconds=0.01) < 1e13


# --- kernels ---


def test_launches_are_put_together_by_their_place_in_the_step():
    events = [("gemm", 1.0), ("add", 5.0), ("gemm", 2.0)] * 2 + [("gemm", 3.0), ("add", 7.0)]
    assert kernel_times.in_steps([*events, ("gemm", 4.0)], 3) == [
        ("gemm", [1.0, 1.0, 3.0]),
        ("add", [5.0, 5.0, 7.0]),
        ("gemm", [2.0, 2.0, 4.0]),
    ]
    with pytest.raises(RuntimeError, match="did not launch the same"):
        kernel_times.in_steps(events, 3)
    with pytest.raises(RuntimeError, match="did not launch the same"):
        kernel_times.in_steps([], 3)


def test_rates_and_shares_of_launches():
    work = {
        ("gemm", 1): kernel_times.Work("down", flops=2 * 10**9),
        ("sum", 0): kernel_times.Work("sum over slots", nbytes=3 * 10**6),
    }
    found = [("gemm", [1.0, 1.0]), ("gemm", [2.0, 2.0]), ("sum", [1.0, 1.0])]
    rows = kernel_times.rows_of(found, 2, work)
    assert [r["phase"] for r in rows] == ["forward", "forward", "backward"]
    assert [r["work"] for r in rows] == [None, "down", "sum over slots"]
    assert [r["share"] for r in rows] == [0.25, 0.5, 0.25]
    assert [r["tflops"] for r in rows] == [None, 1.0, None]
    assert [r["gbs"] for r in rows] == [None, None, 3.0]


def test_the_floor_of_a_gemm_is_the_later_of_the_dense_one_and_its_bytes():
    row = {"work": "up", "time": {"median_ms": 2.0}, "tflops": 1.0, "gbs": 100.0}
    for dense_ms, bandwidth, share in ((1.5, 1e12, 0.75), (0.1, 2e11, 0.5), (0.1, None, 0.05)):
        kernel_times._add_floor(row, {"up": dense_ms}, bandwidth)
        assert row["of_floor"] == pytest.approx(share)


def test_the_work_table_knows_our_kernels_and_adds_up_to_a_step():
    work = kernel_times.work_of(SMALL, 2)
    sources = (ROOT / "kernel_repo/torch-ext/fastmoe/backends/triton").glob("*.py")
    kernels = {k for p in sources for k in re.findall(r"^def (\w+_kernel)\(", p.read_text(), re.M)}
    assert {name for name, _ in work} <= kernels
    assert sum(w.flops for w in work.values()) == 3 * SMALL.flops
    gemms = set(floors.dense_gemms(SMALL, make_inputs(SMALL, torch.float32)))
    assert {w.what for w in work.values() if w.flops} == gemms


# --- the commands ---


def run(tmp_path, *argv: str) -> int:
    return bench_experts.main([*argv, "--out", str(tmp_path), "--seconds", "0.01"])


def test_train_and_decode_write_results_and_print_tables(tmp_path, capsys):
    assert run(tmp_path, "train", "decode", "--problems", "small@8", "--commit", "abc1234") == 0
    train = json.loads((tmp_path / "train-cpu.json").read_text())
    decode = json.loads((tmp_path / "decode-cpu.json").read_text())
    names = [r["implementation"] for r in train["rows"]]
    assert names == ["fastmoe", "grouped_mm", "eager", "dense_limit"]
    for row in train["rows"]:
        assert row["T"] == 8
        for quantity in ("forward", "step", "frozen_step"):
            assert row[quantity]["p10_ms"] <= row[quantity]["median_ms"] <= row[quantity]["p90_ms"]
            assert row[f"{quantity}_tflops"] > 0
    assert all("eager" in r and r["weight_bytes"] > 0 for r in decode["rows"])
    env = train["environment"]
    assert env["commit"] == "abc1234" and env["packages"]["torch"] == torch.__version__
    assert env["command"] == "hf-moe-ep bench train decode --problems small@8 --seconds 0.01"
    out = capsys.readouterr().out
    assert report.table(train) in out and report.table(decode) in out


def test_missing_peers_are_named_with_the_reason(tmp_path, capsys):
    names = "fastmoe,liger,sonicmoe"
    assert run(tmp_path, "train", "--problems", "small@4", "--peers", names) == 0
    out = capsys.readouterr().out
    assert "liger: not available: needs a CUDA GPU" in out
    assert "sonicmoe: not available: needs a CUDA GPU" in out


def not_there(problem):
    raise ImportError("no such kernel")


def broken(problem):
    def forward(inputs):
        raise RuntimeError("illegal memory access")

    return forward


@pytest.mark.parametrize("spoil", [not_there, broken, lambda p: lambda i: peers.eager(p)(i) * 1.1])
@pytest.mark.parametrize("mode", ["train", "decode"])
def test_exit_status_is_1_when_ours_is_not_right(monkeypatch, tmp_path, spoil, mode):
    problem = ["--problems", "small@4", "--peers", "fastmoe,grouped_mm"]
    monkeypatch.setitem(peers.IMPLEMENTATIONS, "fastmoe", spoil)
    assert run(tmp_path, mode, *problem) == 1
    monkeypatch.undo()
    assert run(tmp_path, mode, *problem) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["speed"], "no mode is called 'speed'"),
        (["kernels"], "needs a CUDA device"),
        (["train", "--peers", "megablocks"], "unknown implementations ['megablocks']"),
        (["train", "--problems", "qwen"], "no problem is called 'qwen'"),
        (["train", "--problems", "small@many"], "'small@many'"),
        (["train", "--problems", "interleaved"], "'interleaved' cannot be compared"),
        (["train", "--problems", "no_tokens"], "'no_tokens' cannot be compared"),
        (["train", "--problems", "sentinels"], "'sentinels' cannot be compared"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path, capsys, argv, message):
    assert run(tmp_path, *argv, "--device", "cpu") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_name_stands_for_all_its_sizes_and_tokens_pick_one():
    qwen = bench_experts._named("qwen3-30b-a3b", "train")
    assert [p.T for p in qwen] == [4096, 16384, 32768]
    assert [p.T for p in bench_experts._named("qwen3-30b-a3b", "decode")] == [1, 4, 16, 64]
    assert bench_experts._named("qwen3-30b-a3b@77", "train") == [TRAINING[0].at(77)]
    assert bench_experts._named("small", "train") == [EDGE[0]]


def test_the_command_line_tool_runs_the_same_code(tmp_path):
    from hf_moe_ep.cli import bench

    argv = ["decode", "--problems", "small@2", "--seconds", "0.01", "--out", str(tmp_path)]
    assert bench.main(argv) == 0
    assert (tmp_path / "decode-cpu.json").exists()


def test_first_step_of_a_fresh_process():
    job = (SMALL, "fastmoe", "cpu", "float32", 2)
    row = first_step._run_child(*job, cache="unused")
    assert 0 < row["import_s"] < row["to_end_of_first_step_s"]
    assert [c["T"] for c in row["counts"]] == first_step.unseen_counts(SMALL.T, 2)
    assert all(c["first_ms"] > 0 and c["later_ms"] > 0 for c in row["counts"])


def test_unseen_counts_are_distinct_and_the_same_in_every_run():
    counts = first_step.unseen_counts(16384)
    assert counts == first_step.unseen_counts(16384) and len(set(counts)) == 20
    assert all(8192 <= c < 16384 for c in counts)


def test_the_layout_of_gpt_oss_is_compared_where_it_is_computed(tmp_path, capsys):
    """And the reference of the gate is that of the operator itself."""
    p = next(p for p in EDGE if p.name == "gpt_oss")
    inputs = make_inputs(p, torch.float64)
    want = gate.reference(inputs, problem=p)
    options = dict(gate=fastmoe.Gate(**p.gate_options), is_transposed=True)
    options |= dict(up_bias=inputs.up_bias, down_bias=inputs.down_bias)
    got = gate.run(
        lambda i: fastmoe.reference_experts(
            i.x, i.top_k_index, i.top_k_weights, i.up, i.down, **options
        ),
        inputs,
    )
    assert set(got) == set(want) and {"up_bias", "down_bias"} < set(got)
    assert max(e.worst for e in gate.errors(got, want).values()) < 1e-12

    peers_ = "fastmoe,grouped_mm,eager"
    argv = ["train", "--problems", "gpt_oss", "--peers", peers_, "--seconds", "0.01"]
    assert bench_experts.main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "eager: not available: computes SwiGLU experts with the gate half first" in said


def test_commit_is_named_in_order_of_preference(monkeypatch):
    monkeypatch.setenv("HF_MOE_EP_COMMIT", "from-the-environment")
    assert environment.describe(CPU, "c", "given")["commit"] == "given"
    described = environment.describe(CPU, "c")
    assert described["commit"] == "from-the-environment"
    assert described["variables"]["HF_MOE_EP_COMMIT"] == "from-the-environment"
    json.dumps(described)
    monkeypatch.delenv("HF_MOE_EP_COMMIT")
    monkeypatch.setattr(environment, "_git_commit", lambda: None)
    assert environment.describe(CPU, "c")["commit"] == "unknown"


# --- the report ---


def made_up_results() -> dict[str, dict]:
    """A training and a decode result with figures that are easy to recognise, none measured."""
    env = {
        "device": "Test GPU",
        "driver": "1.2",
        "cuda": "13.0",
        "packages": {"torch": "2.11"},
        "command": "hf-moe-ep bench train",
        "commit": "abc",
        "date": "2026-01-02T03:04:05+00:00",
    }
    shape = {"problem": "p", "T": 64, "H": 8, "I": 4, "E": 2, "K": 1, "skew": 0.0}

    def row(name: str, ms: float, **more) -> dict:
        spread = asdict(timing.Spread(ms, ms * 0.9, ms * 1.1, 10))
        times = dict.fromkeys(("forward", "step", "frozen_step"), spread)
        return shape | {"implementation": name} | times | {"forward_tflops": 1.0} | more

    memory = {"saved_mib": 3.0, "peak_mib": 1795.2, "step_tflops": 1.5, "error_ratio": 0.875}
    absent = shape | {"implementation": "sonicmoe", "not_available": "no module"}
    train = [row("fastmoe", 8.0, **memory), absent, row("dense_limit", 6.0, step_tflops=2.0)]
    graph = {"graph": asdict(timing.Spread(0.02, 0.018, 0.03, 10)), "floor_ms": 0.018}
    decode = [row("fastmoe", 1.0, eager=graph["graph"], active_experts=2, **graph)]
    common = {"dtype": "bfloat16", "bandwidth_gbs": 4300.0, "environment": env}
    return {
        "train-test": common | {"mode": "train", "rows": train},
        "decode-test": common | {"mode": "decode", "rows": decode},
    }


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with results and a README that has a table of each kind to be filled in."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name, result in made_up_results().items():
        (results / f"{name}.json").write_text(json.dumps(result))
    regions = [
        f"<!-- table: {name} -->\nold\n<!-- end -->\n"
        for name in ("train-test", "train-test:short", "decode-test")
    ]
    (tmp_path / "README.md").write_text("before\n" + "between\n".join(regions) + "after\n")
    return tmp_path


def test_tables_say_what_the_results_say():
    results = made_up_results()
    lines = report.table(results["train-test"]).splitlines()
    assert lines[2] == (
        "| p (8, 4, 2, 1) | 64 | **fastmoe** | 8.00 (7.20-8.80) | 8.00 (7.20-8.80) "
        "| 8.00 (7.20-8.80) | 1.50 | 75% | 3.00 | 1795 | 0.88 |"
    )
    assert lines[3].startswith("| p (8, 4, 2, 1) | 64 | cuBLAS limit | 6.00 (5.40-6.60) |")
    assert "sonicmoe: not available: no module" in lines
    assert lines[-1].startswith(
        "Test GPU, driver 1.2, torch 2.11, bfloat16, 2026-01-02, commit abc"
    )
    short = report.table(results["train-test"], short=True).splitlines()
    assert short[0] == "| step ms at (H, I, E, K) | T | **fastmoe** | cuBLAS limit |"
    assert short[2] == "| p (8, 4, 2, 1) | 64 | 8.00 | 6.00 |"
    decode = report.table(results["decode-test"]).splitlines()
    assert decode[2] == (
        "| p (8, 4, 2, 1) | 64 | 2 | **fastmoe** | 20.0 (18.0-30.0) | 20.0 (18.0-30.0) "
        "| 18.0 | 90% |"
    )


def test_a_run_cut_short_is_compared_over_the_steps_that_both_have():
    whole = {"run": "bf16", "loss": [4.0] * 20 + [3.0] * 10 + [1.0] * 20, "step_ms": 215.0}
    short = {"run": "fp32 master", "loss": [5.0] * 20 + [2.0] * 20}
    whole |= {"check_share": 0.0082, "peak_gib": 13.8}
    rows = [row | {"gradient_norm": [1.0] * len(row["loss"])} for row in (whole, short)]
    result = made_up_results()["train-test"] | {"mode": "stability", "steps": 50, "rows": rows}
    lines = report.table(result).splitlines()
    assert "| mean of steps 1-20 | mean of steps 21-40 |" in lines[0]
    assert lines[2] == "| bf16 | 50 of 50 | yes | 4.00 | 4.00 | 2.00 | 215 | 0.8% | 13.8 |"
    assert lines[3] == "| fp32 master | 40 of 50 | yes | 5.00 | 5.00 | 2.00 | - | - | - |"
    rows[0]["gradient_norm"][30] = float("nan")
    rows[1]["not_finite"] = "lm_head.weight, step 40"
    lines = report.table(result).splitlines()
    assert lines[2].startswith("| bf16 | 50 of 50 | no |")
    assert lines[3].startswith("| fp32 master | 40 of 50 | lm_head.weight, step 40 |")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.6e-7, "1.6e-07"), (0.03124, "0.0312"), (7.456, "7.46"), (99.96, "100")]
    + [(12.34, "12.3"), (1795.4, "1795"), (float("nan"), "NaN")],
)
def test_numbers_have_three_digits(value, text):
    assert cells.number(value) == text


def test_report_rewrites_documents_and_check_finds_an_edited_one(checkout, capsys):
    root, readme = ["--root", str(checkout)], checkout / "README.md"
    assert report.main(["--check", *root]) == 1
    assert "old" in readme.read_text()  # --check changes nothing
    assert report.main(root) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    for result in made_up_results().values():
        assert report.table(result) in text
    assert report.main(["--check", *root]) == 0
    readme.write_text(text.replace("8.00", "7.00", 1))
    assert report.main(["--check", *root]) == 1
    assert str(readme) in capsys.readouterr().out
    pngs = sorted(p.name for p in (checkout / "benchmarks/results").glob("*.png"))
    assert pngs == ["roofline-test.png", "train-test.png"]


def test_report_names_a_result_that_is_not_there(checkout):
    (checkout / "benchmarks/results/decode-test.json").unlink()
    with pytest.raises(ValueError, match="no result .*decode-test.json"):
        report.main(["--root", str(checkout)])


def test_step_plot_of_a_result_without_bandwidth(tmp_path):
    result = made_up_results()["train-test"]
    path = plots.step_times(result, tmp_path / "steps.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", report.documents(ROOT), ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_in_the_documentation_are_the_committed_results(path):
    text = path.read_text()
    assert report.rewritten(text) == text, "run: python -m benchmarks.report"
    assert len(report.REGION.findall(text)) == text.count("<!-- table: "), "a table is not closed"


def test_runs_of_unequal_length_are_compared_over_the_steps_that_both_have():
    rows = [{"loss": [4.0, 2.0, 1.0]}, {"loss": [2.0, 1.0]}]
    assert stability._difference(rows, slice(-1, None)) == 1.0
    assert stability._difference(rows, slice(1)) == 1.0
    assert math.isnan(stability._difference([{"loss": [1.0]}, {}], slice(1)))
