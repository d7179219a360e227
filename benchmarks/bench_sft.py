"""Whole models through `hf-moe-ep sft`: tokens/s, MFU and peak memory of Qwen3-30B-A3B geometry,
trained by TRL's SFTTrainer as a user would, with random weights made on the device.

    python -m benchmarks.bench_sft one_gpu     # 8 layers, 4 x 4096 tokens: experts, and a recipe
    python -m benchmarks.bench_sft ep          # two GPUs, 8 layers: our expert parallelism, theirs
    python -m benchmarks.bench_sft recipes     # two GPUs, 48 layers: the recipes for two GPUs
    python -m benchmarks.bench_sft one_gpu:fastmoe,liger                 # some cases of a group

Each case runs in processes of its own, which import side by side and train one case after the
other; a case that fails or takes too long leaves the rest alone. Token ids are uniform, rows full:
routing as even as random weights give it (the logs say how even). The gradients' norm has to be the
same in the cases of one_gpu and ep.
A step lasts from the end of one to the end of the next by the device's clock, with data loading and
logging. MFU: model FLOPs with non-causal attention and without recomputation over the dense peak.
On CPUs: tiny sizes. Exit status 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import Qwen3MoeConfig

from hf_moe_ep import recipes
from hf_moe_ep.cli.demo.data import documents, train_tokenizer

from . import report
from .bench_sequence import QWEN3_30B_A3B, TINY
from .environment import command

WARMUP, STEPS = 3, 8
SETTINGS = {
    "dtype": "bfloat16",
    "bf16": True,
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "max_length": 4096,
    "per_device_train_batch_size": 4,
    "activation_checkpointing": False,
}
THEIRS = SETTINGS | {"experts_implementation": "grouped_mm"}
EP = SETTINGS | {"ep_size": 2, "fsdp_size": 2}
LIGER = {"use_liger_kernel": True}  # norms and rotary; the recipe leaves its SwiGLU off
FAST = "one_gpu_fast"


@dataclass(frozen=True)
class Case:
    """One run through sft: flags, or a recipe as it is."""

    label: str  # in the table
    flags: dict
    recipe: str | None = None
    gpus: int = 1
    layers: int = 8
    limit_s: int = 100  # from its turn on


def as_it_is(recipe: str, **more) -> Case:
    """A recipe with nothing changed but model, data, number of steps, and no checkpoints."""
    return Case(f"recipe {recipe}", {}, recipe, **more)


GROUPS = {
    "one_gpu": {
        "grouped_mm": Case("grouped_mm", THEIRS),
        "fastmoe": Case("fastmoe", SETTINGS),
        "liger": Case(
            "recipe one_gpu_fast, Liger for compile", LIGER | {"torch_compile": False}, FAST
        ),
        "recipe_theirs": Case(
            "recipe one_gpu_fast, grouped_mm",
            {"experts_implementation": "grouped_mm"},
            FAST,
        ),
        "recipe": as_it_is(FAST, limit_s=140),
    },
    "ep": {
        "theirs": Case(
            "AllToAllEP + grouped_mm",
            THEIRS | {"ep_size": 2, "fsdp_size": 2, "ep_implementation": "all_to_all"},
            gpus=2,
        ),
        "ours": Case("fastmoe", EP, gpus=2),
    },
    "recipes": {
        "ep_fsdp": as_it_is("two_gpus_ep_fsdp", gpus=2, layers=48),
        "long_context": as_it_is("two_gpus_long_context", gpus=2, layers=48, limit_s=150),
    },
}
ALIKE = ("one_gpu", "ep")  # the same weights, data and steps in every case
# Not of a group, to be named: what else was tried.
MORE = {
    "one_gpu": {"liger_too": Case("recipe one_gpu_fast, Liger too", LIGER, FAST)},
    "ep": {"compiled": Case("fastmoe, compiled", EP | {"torch_compile": True}, gpus=2)},
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench_sft", allow_abbrev=False, description=__doc__)
    parser.add_argument("what", help=f"{', '.join(GROUPS)}; or GROUP:CASE,CASE")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"timed, after {WARMUP}")
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    args = parser.parse_args(argv)
    group, _, names = args.what.partition(":")
    if group not in GROUPS:
        parser.error(f"no group is called {group!r}; choose from {', '.join(GROUPS)}")
    known = GROUPS[group] | MORE.get(group, {})
    names = names.split(",") if names else list(GROUPS[group])
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no case of {group} is called {unknown}; choose from {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"command": command("python -m benchmarks.bench_sft", argv), "commit": args.commit}
    result = {"benchmark": "sft", "mode": "sft", "group": group, "dtype": None, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        run(chosen, args, record, result, Path(scratch))
    print(report.table(result) if "environment" in result else "no case ended well", flush=True)
    return int(any("error" in row or "wrong" in row for row in result["rows"]))


def run(chosen: dict[str, Case], args, record: dict, result: dict, scratch: Path) -> None:
    """Runs the cases in turn; the result is written after each."""
    started = {name: Ranks(case.gpus, name, args.out, scratch) for name, case in chosen.items()}
    try:
        jobs = {name: job_of(case, args.steps, scratch / name) for name, case in chosen.items()}
        for name, case in chosen.items():
            row = {"case": name, "implementation": case.label, "gpus": case.gpus}
            row |= {"layers": jobs[name]["layers"], "recipe": case.recipe, "flags": case.flags}
            done = started[name].train(record | jobs[name], case.limit_s)
            row |= done.pop("row", {})
            result |= {k: v for k, v in done.items() if k in ("environment", "dtype", "device")}
            row |= {k: v for k, v in done.items() if k in ("error", "seconds")}
            if result["group"] in ALIKE and result["rows"]:
                row |= compare(row, result["rows"][0])
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if "device" in result:
                path = args.out / f"sft-{result['group']}-{result['device']}.json"
                report.save(result, path)
    finally:
        for ranks in started.values():
            ranks.kill()


def compare(row: dict, first: dict) -> dict:
    """Says so if a case did not train as the first did, by the norm of the logged gradient."""
    ours, theirs = (r.get("logged", {}).get("grad_norm") for r in (row, first))
    if ours is None or theirs is None or abs(ours / theirs - 1) < 0.05:
        return {}
    return {"wrong": [f"the gradient's norm is {ours}, and {theirs} in {first['case']}"]}


def job_of(case: Case, steps: int, folder: Path) -> dict:
    """What the ranks of a case are told: sft's command line, its model and data in `folder`."""
    on_gpu = torch.cuda.is_available()
    settings = {} if case.recipe is None else yaml.safe_load(open(recipes.path(case.recipe)))
    settings |= case.flags
    tokens, batch = settings["max_length"], settings["per_device_train_batch_size"]
    flags = case.flags | {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data.jsonl",
        "output_dir": folder / "output",
        "max_steps": WARMUP + steps,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if not on_gpu:
        tokens //= 64
        flags |= {"use_cpu": True, "bf16": False, "dtype": "float32", "max_length": tokens}
        if settings.get("torch_compile"):
            flags["torch_compile_backend"] = "aot_eager"
    sizes, layers = (QWEN3_30B_A3B, case.layers) if on_gpu else (TINY, 2)
    config = Qwen3MoeConfig(
        num_hidden_layers=layers, architectures=["Qwen3MoeForCausalLM"], **sizes
    )
    config.save_pretrained(folder / "model")
    train_tokenizer(documents()[:4], 280).save_pretrained(folder / "model")
    rows = case.gpus * batch * (WARMUP + steps)
    write_rows(folder / "data.jsonl", rows, tokens, sizes["vocab_size"])
    argv = [] if case.recipe is None else ["--config", case.recipe]
    for name, value in flags.items():
        argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    told = {"argv": argv, "warmup": WARMUP, "tokens": tokens, "layers": layers}
    return told | {"result": str(folder / "row.json")}


def write_rows(path: Path, rows: int, tokens: int, vocabulary: int) -> None:
    """Rows of as many random token ids, as sft takes data that is tokenised already."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            ids = draw.choices(range(3, vocabulary), k=tokens)
            file.write(json.dumps({"input_ids": ids}) + "\n")


class Ranks:
    """The processes of one case: started early, told later what to train, and killed in the end."""

    def __init__(self, world: int, name: str, logs: Path, scratch: Path):
        self._logs = [logs / f"sft-{name}-rank{rank}.log" for rank in range(world)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            env = {"OMP_NUM_THREADS": "1"} | os.environ  # as torchrun has it
            env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(scratch / "cache")}
            env |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
            if world == 1:  # Trainer takes every GPU that it sees
                env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            else:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.sft_rank"],
                stdin=subprocess.PIPE,
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                env=env,
                text=True,
                start_new_session=True,  # with the processes that it starts, to be killed as one
            )
            self._processes.append(process)

    def train(self, job: dict, limit_s: float) -> dict:
        """What rank 0 wrote, or the reason as "error"; and how many seconds it took."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            job["port"] = s.getsockname()[1]
        start = time.monotonic()
        for process in self._processes:
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            except BrokenPipeError:  # it has ended already; its status tells
                pass
        error = None
        while error is None and any(p.poll() is None for p in self._processes):
            if failed := [i for i, p in enumerate(self._processes) if p.poll()]:
                error = f"rank {failed[0]} failed: {_last_line(self._logs[failed[0]])}"
            elif time.monotonic() > start + limit_s:
                error = f"no result within {limit_s} s: {_last_line(self._logs[0])}"
            time.sleep(0.1)
        if error is None and (failed := [i for i, p in enumerate(self._processes) if p.poll()]):
            error = f"rank {failed[0]} failed: {_last_line(self._logs[failed[0]])}"
        self.kill()
        found = Path(job["result"])
        done = json.loads(found.read_text()) if error is None and found.exists() else {}
        return done | ({} if done else {"error": error}) | {"seconds": time.monotonic() - start}

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks end too
    sys.exit(main(sys.argv[1:]))
