"""`model.generate()` of a Qwen3-30B-A3B with eight layers and random weights: tokens/s, greedy,
with a dynamic cache and with the static one that transformers compiles; only the experts differ.

    python -m benchmarks.bench_generate

Right before fast: the logits of every token that fastmoe generates are held against a wider copy of
the model with transformers' eager experts, fed the same tokens, by grouped_mm's error there. With
"grouped_mm" generate() decodes by batched_mm (transformers 5.23, `_optimize_model_for_decode`);
fastmoe stays in place. B sequences of P tokens, N new ones.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import hf_moe_ep  # noqa: F401 - registers fastmoe

from . import gate, report
from .bench_sequence import QWEN3_30B_A3B, TINY
from .environment import command, describe, device_slug
from .peers import BASELINE, OURS
from .timing import synchronize

# The same function by another name, which generate() leaves in place.
KEPT = "grouped_mm_in_decode"
ALL_EXPERTS_FUNCTIONS.register(KEPT, grouped_mm_experts_forward)


def main(argv: list[str]) -> int:
    """Gate, warm up and time every batch and cache. Returns 1 when our logits are wrong."""
    args = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(args.layers, device)
    wide = gate.wide(model.dtype)
    reference = copy.deepcopy(model).to(wide)
    reference.set_experts_implementation("eager")
    result = {
        "benchmark": "generate",
        "mode": "generate",
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": args.layers,
        "rows": [],
        "environment": describe(device, command("python -m benchmarks.bench_generate", argv)),
    }
    result["environment"] |= {"commit": args.commit} if args.commit else {}
    path = args.out / f"generate-{device_slug(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    static = [int(b) for b in args.static_batches.split(",") if b]
    for batch in map(int, args.batches.split(",")):
        for cache in ("dynamic", "static") if batch in static else ("dynamic",):
            names = [OURS, BASELINE] + [KEPT] * (cache == "dynamic")
            result["rows"] += measure(model, reference, names, batch, cache, args)
            report.save(result, path)
    print(f"\n{report.table(result)}\n{path}", flush=True)
    return int(any("wrong" in row for row in result["rows"]))


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench_generate", allow_abbrev=False, description=__doc__)
    parser.add_argument("--layers", type=int, default=8 if on_gpu else 2)
    parser.add_argument("--prompt", type=int, default=128 if on_gpu else 8, help="P")
    parser.add_argument("--new", type=int, default=128 if on_gpu else 6, help="N")
    parser.add_argument("--batches", default="1,16" if on_gpu else "1,3", help="B")
    parser.add_argument("--static-batches", default="1", help="those also with a static cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", help="for the record, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("bench_output"))
    return parser


def make_model(layers: int, device: torch.device) -> nn.Module:
    """Random weights, bf16 on a GPU; a tiny model in fp32 on a CPU. Nothing ends a sequence."""
    on_gpu = device.type == "cuda"
    sizes = QWEN3_30B_A3B if on_gpu else TINY
    config = Qwen3MoeConfig(num_hidden_layers=layers, **sizes)
    torch.manual_seed(0)
    with device:
        model = Qwen3MoeForCausalLM._from_config(
            config, dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = None
    return model.eval()


def measure(
    model: nn.Module,
    reference: nn.Module,
    names: list[str],
    batch: int,
    cache: str,
    args: argparse.Namespace,
) -> list[dict]:
    """A row per implementation: the first call, which compiles, then --rounds, taking turns."""
    torch.manual_seed(1)
    shape = (batch, args.prompt)
    prompt = torch.randint(model.config.vocab_size, shape, device=model.device)
    rows = {}
    for name in names:
        started = time.perf_counter()
        out = generate(model, name, prompt, cache, args.new, output_logits=name == OURS)
        rows[name] = {
            "implementation": name, "batch": batch, "cache": cache, "prompt": args.prompt,
            "new": args.new, "first_s": time.perf_counter() - started, "seconds": [],
        }  # fmt: skip
        if name == OURS:
            got = torch.stack(out.logits, 1)  # (B, N, vocabulary)
            rows[name] |= judge(model, reference, out.sequences, got)
        del out
    fit = [n for n in names if "wrong" not in rows[n]]
    for index in range(args.rounds):
        for name in fit[index % len(fit) :] + fit[: index % len(fit)]:
            started = time.perf_counter()
            generate(model, name, prompt, cache, args.new)
            rows[name]["seconds"].append(time.perf_counter() - started)
    for name in fit:
        seconds = statistics.median(rows[name]["seconds"])
        rows[name] |= {
            "tokens_per_s": batch * args.new / seconds,
            "ms_per_step": seconds / args.new * 1e3,
        }
        rate = rows[name]["tokens_per_s"]
        print(f"B={batch} {cache} {name}: {rate:.1f} tokens/s {rows[name]['seconds']}", flush=True)
    return list(rows.values())


def generate(model: nn.Module, name: str, prompt: Tensor, cache: str, new: int, **options):
    """A greedy `generate()` of `new` tokens by the experts `name`; waits for the device."""
    model.set_experts_implementation(name)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True,
        **({"cache_implementation": "static"} if cache == "static" else {}), **options,
    )  # fmt: skip
    synchronize(model.device)
    return out


@torch.no_grad()
def judge(model: nn.Module, reference: nn.Module, sequences: Tensor, got: Tensor) -> dict:
    """Our error of the logits (B, N, vocabulary) and what is allowed: twice that of grouped_mm fed
    the same tokens (B, P + N), plus rounding; "wrong" when it is more.
    """
    new = got.shape[1]
    model.set_experts_implementation(BASELINE)
    found = {"ours": got}
    for key, one in (("want", reference), ("baseline", model)):
        found[key] = one(sequences[:, :-1], logits_to_keep=new, use_cache=False).logits
    want = found["want"]
    error, baseline = (float((found[k] - want).norm() / want.norm()) for k in ("ours", "baseline"))
    eps = torch.finfo(model.dtype).eps
    allowed = 2 * baseline + (4 * eps if model.dtype == torch.float32 else eps / 4)
    verdict = {"logits_error": error, "allowed": allowed}
    if not error <= allowed:
        verdict["wrong"] = [f"logits: error {error:.3g}, not below {allowed:.3g}"]
    return verdict


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
