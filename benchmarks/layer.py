"""Measures one experts layer: a training step, or a decode call, of every implementation that
passes the gate.

Each function returns rows, one dictionary of JSON values per implementation; report.py makes tables
from them.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from . import floors, gate, peers
from .gate import Forward
from .problems import Inputs, Problem, make_inputs
from .timing import ColdIdleDevice, drop_gradients, interleave, memory_of_step

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    seconds: float  # spent on the rounds of one quantity at one problem, e.g. 3.0
    implementations: tuple[str, ...]  # e.g. ("fastmoe", "grouped_mm")
    bandwidth: float | None  # bytes per second, measured; None where it was not


def train(problem: Problem, settings: Settings) -> list[Row]:
    """Forward, step (all gradients), step with frozen weights, and the memory of the step."""
    inputs = make_inputs(problem, settings.dtype, str(settings.device))
    rows, admitted = admit(problem, inputs, settings, gradients=True)
    leaves = list(inputs.leaves().values())
    limit = floors.dense_limit(problem, inputs)
    rows[floors.DENSE] = new_row(problem, floors.DENSE)

    def forward_calls(names: list[str]) -> dict[str, Callable[[], object]]:
        return {n: torch.no_grad()(lambda f=admitted[n]: f(inputs)) for n in names}

    def step_calls(names: list[str]) -> dict[str, Callable[[], object]]:
        def step(forward: Forward) -> None:
            try:
                forward(inputs).backward(inputs.grad)
            finally:
                drop_gradients(leaves)

        return {n: lambda f=admitted[n]: step(f) for n in names}

    for quantity, calls, weights_train, gemms in (
        ("forward", forward_calls, True, 2),
        ("step", step_calls, True, 6),
        ("frozen_step", step_calls, False, 4),
    ):
        inputs.up.requires_grad_(weights_train)
        inputs.down.requires_grad_(weights_train)
        working = _working(calls(list(admitted)), rows, quantity)
        times = interleave(
            working | {floors.DENSE: limit[quantity]}, settings.device, settings.seconds
        )
        for name, spread in times.items():
            tflops = problem.flops * gemms / 2 / spread.median_ms / 1e9
            rows[name] |= {quantity: asdict(spread), f"{quantity}_tflops": tflops}
        if quantity == "step":
            for name in working:
                memory = memory_of_step(lambda f=admitted[name]: f(inputs), inputs.grad, leaves)
                rows[name] |= asdict(memory)
    return list(rows.values())


def decode(problem: Problem, settings: Settings) -> list[Row]:
    """A forward call of few tokens: as it is called from Python on an idle device, and one of
    those in a CUDA graph.
    """
    inputs = make_inputs(problem, settings.dtype, str(settings.device))
    rows, admitted = admit(problem, inputs, settings, gradients=False)
    with torch.no_grad():
        calls = {n: lambda f=f: f(inputs) for n, f in admitted.items()}
        eager = interleave(
            calls, settings.device, settings.seconds, ColdIdleDevice(settings.device)
        )
        for name, spread in eager.items():
            rows[name]["eager"] = asdict(spread)
        if settings.device.type == "cuda":
            _time_graphs(problem, inputs, admitted, rows, settings)
    active, nbytes = floors.decode_bytes(problem, inputs)
    for row in rows.values():
        row |= {"active_experts": active, "weight_bytes": nbytes}
        if settings.bandwidth:
            row["floor_ms"] = nbytes / settings.bandwidth * 1e3
    return list(rows.values())


def _time_graphs(
    problem: Problem,
    inputs: Inputs,
    admitted: dict[str, Forward],
    rows: dict[str, Row],
    settings: Settings,
) -> None:
    """A replay's time by the number of its calls: a model's graph holds many layers.

    Nothing clears the L2 cache between replays: a call finds there what the call before it read,
    and no lines to be written back, which clearing would leave. That is other experts' weights, or,
    where the tokens go to more than half of the experts, the last of its own, many times the cache.
    """
    layers = _disjoint(problem, inputs)
    ends = {n: gate.reference(layers[n], False, problem) for n in {0, len(layers) - 1}}
    replays, stream = {}, torch.cuda.current_stream()
    for name, forward in admitted.items():
        try:
            replay, outputs = _capture(forward, layers)
        except Exception as e:  # a peer may fail in any way; the row says how
            rows[name]["graph_error"] = _first_line(e)
            torch.cuda.set_stream(stream)  # a capture that fails stays on its own stream
            continue
        for n in ends:
            outputs[n].fill_(float("nan"))
        replay()
        found = [gate.errors({gate.OUTPUT: outputs[n]}, want) for n, want in ends.items()]
        norms = [f[gate.OUTPUT].norm for f in found]
        once = rows[name]["errors"][gate.OUTPUT]["norm"]
        if not all(norm < 2 * once + 1e-6 for norm in norms):
            rows[name]["graph_error"] = f"replay is wrong: norm errors {norms}"
            continue
        replays[name] = replay
    if not replays:
        return
    times = interleave(replays, settings.device, settings.seconds, before=lambda: None)
    for name, spread in times.items():
        each = {k: v / len(layers) for k, v in asdict(spread).items() if k.endswith("_ms")}
        rows[name] |= {"graph": asdict(spread) | each, "graph_calls": len(layers)}


def _disjoint(problem: Problem, inputs: Inputs) -> list[Inputs]:
    """The inputs, and the same for as many other sets of experts as there are: layers of a model
    have weights of their own too.
    """
    active = inputs.top_k_index.unique()
    active = active[active < problem.E]
    table = torch.arange(int(inputs.top_k_index.max()) + 1, device=active.device)
    others = torch.arange(problem.E, device=active.device)
    others = others[~torch.isin(others, active)]
    layers = [inputs]
    for experts in others.split(len(active)) if len(active) else ():
        if len(experts) == len(active):
            table[active] = experts
            layers.append(replace(inputs, top_k_index=table[inputs.top_k_index]))
    return layers


def _capture(
    forward: Forward, layers: list[Inputs]
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """The replay of a graph of one call for each of `layers`, and what these write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(layers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [forward(inputs) for inputs in layers]
    return graph.replay, outputs


def admit(
    problem: Problem, inputs: Inputs, settings: Settings, gradients: bool
) -> tuple[dict[str, Row], dict[str, Forward]]:
    """A row for each implementation, and those that may be timed: built, run, and found right."""
    built, missing = peers.build(list(settings.implementations), problem, settings.device)
    rows = {n: new_row(problem, n) for n in settings.implementations}
    for name, reason in missing.items():
        rows[name]["not_available"] = reason
    want = gate.reference(inputs, gradients, problem)
    baseline_forward = peers.IMPLEMENTATIONS[peers.BASELINE](problem)
    baseline = gate.errors(gate.run(baseline_forward, inputs, gradients), want)
    unfit = gate.gross_objections(baseline, settings.dtype)
    if unfit:
        raise RuntimeError(f"{problem.name}: no yardstick for the gate: {'; '.join(unfit)}")
    admitted = {}
    for name, forward in built.items():
        try:
            found = gate.errors(gate.run(forward, inputs, gradients), want)
        except Exception as e:  # a peer may fail in any way; the row says how
            rows[name]["error"] = _first_line(e)
            continue
        objections = gate.gross_objections(found, settings.dtype)
        if name in (peers.OURS, peers.LEAN):
            objections = gate.objections(found, baseline, settings.dtype)
        if objections:
            rows[name]["wrong"] = objections
            continue
        rows[name]["errors"] = {k: asdict(v) for k, v in found.items()}
        rows[name]["error_ratio"] = max(v.norm / baseline[k].norm for k, v in found.items())
        admitted[name] = forward
    return rows, admitted


def _working(
    calls: dict[str, Callable[[], object]], rows: dict[str, Row], quantity: str
) -> dict[str, Callable[[], object]]:
    """The calls that return; the rows of the others say why they do not."""
    working = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as e:  # a peer may fail in any way; the row says how
            rows[name][f"{quantity}_error"] = _first_line(e)
        else:
            working[name] = call
    return working


def new_row(problem: Problem, implementation: str) -> Row:
    shape = {k: getattr(problem, k) for k in ("T", "H", "I", "E", "K", "skew")}
    return {"problem": problem.name, **shape, "implementation": implementation}


def _first_line(e: Exception) -> str:
    traceback.print_exception(e, file=sys.stderr)
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
