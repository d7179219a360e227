"""The experts benchmark: `python -m benchmarks.bench_experts`, or `hf-moe-ep bench` where the
package is installed.

Modes: train, decode, kernels (a GPU only), first_step, accumulate. Each writes one JSON file, after
every problem, and prints its table; the exit status is 1 when our own implementation is wrong,
fails or is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import accumulate, first_step, floors, kernel_times, layer, peers, report
from .environment import command, describe, device_slug
from .layer import Row, Settings
from .problems import DECODE, EDGE, TRAINING, Problem

# Small enough for two CPU cores: a look at whether everything works, not at speed.
CPU = (Problem("cpu-small", 512, 256, 128, 16, 4),)
CPU_DECODE = tuple(CPU[0].at(t) for t in (1, 16))
FIRST_STEP_T = 16384

# batched_mm copies the weights of every slot: 768 GiB for the up projection alone at Qwen3-30B-A3B
# with 16384 tokens. sonicmoe tunes for more than a minute at each token count (H200, November
# 2026). Both can be asked for.
GPU_PEERS = {
    "train": ("fastmoe", "grouped_mm", "liger", "scattermoe"),
    "decode": ("fastmoe", "grouped_mm", "batched_mm", "scattermoe"),
    "kernels": ("fastmoe",),
    "first_step": ("fastmoe", "grouped_mm"),
    "accumulate": ("fastmoe", "fastmoe_lean"),
}
CPU_PEERS = {
    "train": ("fastmoe", "grouped_mm", "eager"),
    "decode": ("fastmoe", "grouped_mm", "batched_mm"),
    "first_step": ("fastmoe", "grouped_mm"),
    "accumulate": ("fastmoe", "fastmoe_lean"),
}


def main(argv: list[str]) -> int:
    """Run the modes named in `argv` (train and decode when none is). Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        jobs = [_job(mode, args) for mode in args.modes or ["train", "decode"]]
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    status = 0
    for mode, problems, settings in jobs:
        status |= _run(mode, problems, settings, args, argv)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-moe-ep bench",
        allow_abbrev=False,
        description="Times an MoE layer's experts: ours beside others, and the machine's limits.",
    )
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(GPU_PEERS))
    parser.add_argument(
        "--quick", action="store_true", help="few problems, few rounds: about a minute"
    )
    parser.add_argument(
        "--problems", help="names, or NAME@TOKENS, with commas between (default: the mode's own)"
    )
    parser.add_argument(
        "--peers", help=f"of {', '.join(peers.IMPLEMENTATIONS)}, with commas between"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--seconds", type=float, help="for the rounds of one quantity at one problem"
    )
    parser.add_argument("--counts", type=int, default=20, help="unseen token counts in first_step")
    parser.add_argument(
        "--commit", help="for the record, where git cannot tell ($HF_MOE_EP_COMMIT does too)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench_output"), help="folder for the JSON files"
    )
    return parser


def _job(mode: str, args: argparse.Namespace) -> tuple[str, list[Problem], Settings]:
    """Problems and settings of one mode. Raises ValueError for what cannot be run here."""
    if mode not in GPU_PEERS:
        raise ValueError(f"no mode is called {mode!r}; choose from {list(GPU_PEERS)}")
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if mode == "kernels" and not on_gpu:
        raise ValueError("the mode 'kernels' reads a GPU's own clock: it needs a CUDA device")
    defaults = (GPU_PEERS if on_gpu else CPU_PEERS)[mode]
    names = tuple(args.peers.split(",")) if args.peers else defaults
    peers.check_names(names)
    settings = Settings(
        device=device,
        dtype=getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32")),
        seconds=args.seconds or (0.3 if args.quick or not on_gpu else 3.0),
        implementations=names,
        bandwidth=floors.stream_bandwidth(device) if on_gpu and mode != "first_step" else None,
    )
    problems = _problems(mode, args, on_gpu)
    for problem in problems:
        peers.check_problem(problem)
    return mode, problems, settings


def _problems(mode: str, args: argparse.Namespace, on_gpu: bool) -> list[Problem]:
    if args.problems:
        return [p for text in args.problems.split(",") for p in _named(text, mode)]
    if not on_gpu:
        chosen = CPU_DECODE if mode == "decode" else CPU
    elif mode == "train":
        chosen = TRAINING[:2] if args.quick else TRAINING
    elif mode == "decode":
        chosen = (DECODE[0], DECODE[-1]) if args.quick else DECODE
    elif mode == "kernels":
        chosen = (TRAINING[0], TRAINING[0].at(FIRST_STEP_T))
    else:
        chosen = (TRAINING[0].at(FIRST_STEP_T),)
    return list(chosen)


def _named(text: str, mode: str) -> list[Problem]:
    """The problems called NAME in the mode's own set, or in any set; or that problem at NAME@TOKENS
    tokens.
    """
    name, _, tokens = text.partition("@")
    known = [
        p for p in (*(DECODE if mode == "decode" else TRAINING), *CPU, *EDGE) if p.name == name
    ]
    if not known:
        names = sorted({p.name for p in (*TRAINING, *CPU, *EDGE)})
        raise ValueError(f"no problem is called {name!r}; choose from {names}")
    if not tokens:
        return known
    if not tokens.isdigit() or int(tokens) < 1:
        raise ValueError(f"{text!r}: the tokens after @ must be a whole number above 0")
    return [known[0].at(int(tokens))]


def _run(
    mode: str,
    problems: list[Problem],
    settings: Settings,
    args: argparse.Namespace,
    argv: list[str],
) -> int:
    result = {
        "benchmark": "experts",
        "mode": mode,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "bandwidth_gbs": settings.bandwidth and settings.bandwidth / 1e9,
        "rows": [],
    }
    path = args.out / f"{mode}-{device_slug(settings.device)}{'-quick' * args.quick}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for problem in problems:
        for row in _measure(mode, problem, settings, args):
            result["rows"].append(row)
            print(f"[{time.perf_counter() - started:6.1f} s] {report.one_line(row)}", flush=True)
        # After the measurement, because an adapter may set a variable that belongs to the record.
        said = command("hf-moe-ep bench", argv)
        result["environment"] = describe(settings.device, said, args.commit)
        report.save(result, path)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{report.table(result)}\n{path}", flush=True)
    return int(any(_ours_failed(row) for row in result["rows"]))


def _measure(
    mode: str, problem: Problem, settings: Settings, args: argparse.Namespace
) -> Iterator[Row]:
    if mode == "first_step":
        dtype = str(settings.dtype).removeprefix("torch.")
        for name in settings.implementations:
            yield from first_step.measure(problem, name, str(settings.device), dtype, args.counts)
        return
    by_mode: dict[str, Callable[[Problem, Settings], list[Row]]] = {
        "train": layer.train,
        "decode": layer.decode,
        "kernels": kernel_times.measure,
        "accumulate": accumulate.measure,
    }
    yield from by_mode[mode](problem, settings)


def _ours_failed(row: Row) -> bool:
    failures = [k for k in row if k in ("wrong", "not_available") or k.endswith("error")]
    return row["implementation"] in (peers.OURS, peers.LEAN) and bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
