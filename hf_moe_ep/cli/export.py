"""`hf-moe-ep export CHECKPOINT FOLDER`: the hub's safetensors from a checkpoint of a sharded run.
One process, on a CPU; host memory: a file's worth, or a layer's."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer, chat template
NOT_OF_THE_MODEL = ("manifest.json", "trainer_state.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Exports as the command line `argv` says; 0, or 2 where that is refused, with the reason."""
    parser = argparse.ArgumentParser(prog="hf-moe-ep export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-<step> of a sharded run")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--max_shard_size_gb", type=float, default=5.0, help="largest file")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.folder, int(args.max_shard_size_gb * 10**9))
    except (ValueError, OSError) as error:
        print(f"hf-moe-ep export: error: {error}", file=sys.stderr)
        return 2
    return 0


def export(checkpoint: Path, folder: Path, max_shard_size: int) -> None:
    """Writes weights, config and tokenizer of `checkpoint` to `folder`.

    Raises:
        ValueError: not a whole checkpoint, without the config that a Trainer saves, or of a class
            that is not in transformers.
    """
    from ..training import checkpoint_files, export_checkpoint

    checkpoint_files.read_manifest(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint / 'config.json'} is missing; copy the model's there")
    config = AutoConfig.from_pretrained(checkpoint)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{checkpoint / 'config.json'}: architecture {name} is not transformers'")
    with torch.device("meta"):
        model = model_class(config)
    export_checkpoint(checkpoint, model, folder, max_shard_size)
    for pattern in BESIDE_WEIGHTS:
        for path in checkpoint.glob(pattern):
            if path.name not in NOT_OF_THE_MODEL:
                shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    sys.exit(main())
