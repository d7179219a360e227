"""The command `hf-moe-ep`: finds the subcommand and hands it the rest of the command line.
A subcommand is imported when it is called, so `hf-moe-ep --help` needs no extra."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from ..versions import __version__

COMMANDS = {
    "demo": "train a small MoE twice, eager and fastmoe, and compare speed and loss curves",
    "sft": "TRL's supervised fine-tuning with fastmoe experts and expert parallelism",
    "export": "the hub's safetensors from a checkpoint of a sharded run",
    "doctor": "versions, GPU, kernels and layout: what will run here, and what will not",
    "plan": "layouts of a model on your GPUs: memory, step time, and the command for each",
    "bench": "the experts benchmark on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf-moe-ep argv`; argv is sys.argv[1:] by default.

    Returns the exit status: 0, 1 where a command found a problem, 2 where it cannot be run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<8}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hf-moe-ep",
        usage="hf-moe-ep COMMAND [options]",
        description=f"commands:\n{listing}\n\n`hf-moe-ep COMMAND --help` lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"hf-moe-ep {__version__}")
    command = parser.parse_args(argv[:1]).command
    return import_module(f"hf_moe_ep.cli.{command}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
