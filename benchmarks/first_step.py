"""How long a fresh process waits for its first training step, and what each token count that it has
not seen costs.

A child process per implementation: once with empty compiler caches ("cold"), once with those that
the first left on disk ("warm"). After the first step come twenty token counts, each timed on its
first step and on later ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace

import torch

from . import peers
from .problems import Inputs, Problem, make_inputs
from .timing import drop_gradients, synchronize

LATER_STEPS = 5
CHILD_LIMIT_S = 300


def unseen_counts(tokens: int, how_many: int = 20) -> list[int]:
    """Distinct token counts between tokens / 2 and tokens, the same in every run, in no order."""
    return random.Random(0).sample(range(tokens // 2, tokens), how_many)


def measure(problem: Problem, name: str, device: str, dtype: str, how_many: int) -> list[dict]:
    """Two rows, cold and warm. Times in seconds from the start of the process, or milliseconds per
    step.
    """
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for caches in ("cold", "warm"):
            shape = {k: getattr(problem, k) for k in ("T", "H", "I", "E", "K", "skew")}
            row = {"problem": problem.name, **shape, "implementation": name, "caches": caches}
            rows.append(row | _run_child(problem, name, device, dtype, how_many, cache))
    return rows


def _run_child(
    problem: Problem, name: str, device: str, dtype: str, how_many: int, cache: str
) -> dict[str, object]:
    job = {
        "problem": asdict(problem),
        "name": name,
        "device": device,
        "dtype": dtype,
        "counts": unseen_counts(problem.T, how_many),
        "spawned_at": time.time(),
    }
    command = [sys.executable, "-m", f"{__package__}.first_step", json.dumps(job)]
    caches = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    try:
        done = subprocess.run(
            command, env=os.environ | caches, capture_output=True, text=True, timeout=CHILD_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {CHILD_LIMIT_S} s"}
    if done.returncode:
        sys.stderr.write(done.stderr)
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _child(job: dict) -> dict[str, object]:
    torch_s = time.time() - job["spawned_at"]
    problem, device = Problem(**job["problem"]), torch.device(job["device"])
    built, missing = peers.build([job["name"]], problem, device)
    if missing:
        return {"not_available": missing[job["name"]]}
    forward = built[job["name"]]
    imported_s = time.time() - job["spawned_at"]
    inputs = make_inputs(problem, getattr(torch, job["dtype"]), job["device"])
    synchronize(device)
    first_ms = _step_ms(forward, inputs, device)
    result = {
        "torch_s": torch_s,  # of the import: Python's start and torch
        "import_s": imported_s,
        "first_step_s": first_ms / 1e3,
        "to_end_of_first_step_s": time.time() - job["spawned_at"],  # making the inputs included
    }
    steady_ms = statistics.median(_step_ms(forward, inputs, device) for _ in range(LATER_STEPS))
    counts = []
    for tokens in job["counts"]:
        fewer = _at(inputs, tokens)
        first_ms = _step_ms(forward, fewer, device)
        later_ms = statistics.median(_step_ms(forward, fewer, device) for _ in range(LATER_STEPS))
        counts.append({"T": tokens, "first_ms": first_ms, "later_ms": later_ms})
    return result | {"steady_ms": steady_ms, "counts": counts}


def _at(inputs: Inputs, tokens: int) -> Inputs:
    """The same layer on its first tokens."""
    names = ("x", "top_k_index", "top_k_weights", "grad")
    return replace(inputs, **{n: getattr(inputs, n).detach()[:tokens] for n in names})


def _step_ms(forward, inputs: Inputs, device: torch.device) -> float:
    leaves = list(inputs.leaves().values())
    for leaf in leaves:
        leaf.requires_grad_()
    start = time.perf_counter()
    forward(inputs).backward(inputs.grad)
    synchronize(device)
    elapsed = (time.perf_counter() - start) * 1e3
    drop_gradients(leaves)
    return elapsed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The child process of the first_step benchmark.")
    parser.add_argument("job", type=json.loads)
    print(json.dumps(_child(parser.parse_args().job)))
