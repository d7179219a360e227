"""The command `hf-moe-ep demo`: trains a small Qwen3-MoE on Python's manual with eager experts and
with fastmoe, compares the two, reloads the result, samples from it, and writes plot and numbers."""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..extras import require

PROMPT = "The for statement is used to"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo that `argv` asks for; argv is sys.argv[1:] by default.

    Returns 0; 1 if the loss curves are further apart than float noise, or the saved model is not
    the trained one; 2 if the demo cannot run here.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options().parse_args(argv)
    try:
        require("trl,bench", "trl", "datasets", "matplotlib")
        settings = choose_settings(args)
    except (ImportError, ValueError) as error:
        print(f"hf-moe-ep demo: error: {error}", file=sys.stderr)
        return 2
    return demo(settings, args.output, shlex.join(["hf-moe-ep", "demo", *argv]))


def options() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="hf-moe-ep demo", description=__doc__)
    output = Path("demo_output")
    parser.add_argument("--output", type=Path, default=output, help=f"folder (default: {output})")
    parser.add_argument("--steps", type=int, help="optimizer steps of each of the two runs")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--seed", type=int, help="of the weights and of the data order")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    return parser


def choose_settings(args: argparse.Namespace):
    """The `Settings` for this machine, changed as the command line says.

    Raises:
        ValueError: a count below 1, or a GPU that is not there or has no bfloat16.
    """
    import torch

    from .settings import CPU, CUDA

    changes = {name: getattr(args, name) for name in ("steps", "batch", "seed")}
    changes = {name: value for name, value in changes.items() if value is not None}
    for name in ("steps", "batch"):
        if changes.get(name, 1) < 1:
            raise ValueError(f"--{name} {changes[name]}: give 1 or more")
    found = torch.cuda.is_available()
    if args.device == "cpu" or (args.device is None and not found):
        return replace(CPU, **changes)
    if not found:
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name()} has no bfloat16; use --device cpu")
    return replace(CUDA, **changes)


def demo(settings, output: Path, command: str) -> int:
    """Trains twice, compares and writes `output`/{loss.png,demo.json,model/}; the exit status."""
    import datasets
    import torch
    import transformers

    from ...kernel import get_kernel
    from . import data, provenance, report, train

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    device = provenance.device_name(settings.device)
    backend = get_kernel().backend_name(torch.empty(0, device=settings.device))
    texts = data.documents()
    tokenizer = data.train_tokenizer(texts, settings.vocab)

    with tempfile.TemporaryDirectory() as scratch:
        initial = Path(scratch) / "initial"
        parameters = train.write_initial_model(settings, tokenizer, initial)
        print(
            f"Qwen3-MoE: {settings.layers} layers, {settings.experts} experts, "
            f"top-{settings.top_k}, {parameters / 1e6:.1f} M parameters in {settings.dtype}\n"
            f"on {device}; fastmoe uses its {backend} backend here\n"
            f"{settings.steps} steps of {settings.tokens_per_step} tokens of Python's manual, twice"
        )
        eager, _ = train.train(settings, "eager", initial, texts, Path(scratch))
        fast, trainer = train.train(settings, "fastmoe", initial, texts, Path(scratch))
    trainer.save_model(str(output / "model"))
    model, same = train.reload(trainer.model, settings, output / "model")
    sample = train.generate(model, tokenizer, PROMPT, settings.seed)
    verdict = report.judge(settings, eager, fast)
    print(f"\n{report.table(settings, eager, fast)}\n\n{conclusion(settings, verdict)}")
    print(f"Saved and reloaded: {'all' if same else 'NOT all'} weights are the same bits.")
    print(f"Sample: {sample!r}\n")

    report.plot(settings, eager, fast, device, output / "loss.png")
    runs = [asdict(run) | {"step_seconds": report.step_seconds(run)} for run in (eager, fast)]
    numbers = {
        "command": command,
        "commit": provenance.commit(),
        "device": device,
        "backend": backend,
        "versions": provenance.versions(),
        "settings": asdict(settings),
        "parameters": parameters,
        "runs": runs,
        "verdict": asdict(verdict),
        "reloaded_weights_equal": same,
        "sample": sample,
    }
    (output / "demo.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"Wrote {output / 'loss.png'}, {output / 'demo.json'} and {output / 'model'}.")
    return 0 if same and verdict.problem is None else 1


def conclusion(settings, verdict) -> str:
    """The verdict in two lines."""
    bounds = settings.bounds
    found = (
        f"Largest difference between the two loss curves: {verdict.all_steps:.1e} at step "
        f"{verdict.at_step} (bound {bounds.all_steps:.0e}); in the first steps: "
        f"{verdict.first_steps:.1e} (bound {bounds.first_steps:.0e})."
    )
    if verdict.problem is None:
        return f"{found}\nThat is float noise."
    return f"{found}\nThat is NOT float noise: {verdict.problem}."
