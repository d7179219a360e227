"""`hf-moe-ep sft`: TRL's own SFT script with fastmoe experts, parallel layouts and telemetry.
Runs as one process, under torchrun, and under `accelerate launch -m hf_moe_ep.cli.sft`."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from .extras import require

USAGE = "hf-moe-ep sft [--config FILE.yaml] --model_name_or_path NAME --dataset_name NAME [...]"
BUILDERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line `argv` says; argv is sys.argv[1:] by default.

    Returns 0, or 2 for a command line that is refused, with the reason on stderr.
    """
    try:
        require("trl", "trl", "datasets")
        arguments = prepare(list(sys.argv[1:] if argv is None else argv))
    except (ImportError, ValueError, OSError) as error:
        print(f"hf-moe-ep sft: error: {error}", file=sys.stderr)
        return 2
    from trl.scripts.sft import main as trl_main

    trl_main(*arguments)
    return 0


def prepare(argv: list[str]) -> tuple:
    """What trl.scripts.sft.main takes: ScriptArguments, SFTConfig, ModelConfig and
    DatasetMixtureConfig. Nothing is downloaded but the config of a hub model.

    Raises:
        ValueError: an unknown flag or key, or a layout that cannot run; the message names it.
    """
    parser = make_parser()
    argv = refuse_unknown(parser, argv)
    script, training, model, mixture, ours = parser.parse_args_and_config(argv)
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing; give a hub name or a folder")
    local_file_as_mixture(script, mixture)
    if not (script.dataset_name or mixture.datasets):
        raise ValueError(
            "--dataset_name is missing; give a hub name, a folder or a file, or `datasets:` in a "
            "--config file"
        )
    set_model_init_kwargs(training, model, ours)
    add_telemetry(training)
    return script, training, model, mixture


def make_parser():
    """A TrlParser over the dataclasses of TRL's SFT script and `FastMoEArguments`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from .arguments import SFTArguments
    from .layout import FastMoEArguments

    parser = TrlParser(
        (ScriptArguments, SFTArguments, ModelConfig, DatasetMixtureConfig, FastMoEArguments),
        prog="hf-moe-ep sft",
        usage=USAGE,
        description=__doc__,
        allow_abbrev=False,
    )
    # For --help alone: TrlParser takes --config out of the command line before it parses.
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        default=argparse.SUPPRESS,
        help="Flags and their values, and environment variables under `env`; flags override it.",
    )
    return parser


def refuse_unknown(parser, argv: list[str]) -> list[str]:
    """`argv` as TrlParser reads it, once every flag and every key of its --config file is known.

    Raises:
        ValueError: names the flags or keys that are not known, and the nearest that are.
    """
    argv = [p for a in argv for p in (a.split("=", 1) if a.startswith("--config=") else [a])]
    known = {action.dest for action in parser._actions} - {"config", "help"}
    flags = argv
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs the path of a YAML file")
        refuse_unknown_keys(argv[at + 1], known)
        flags = argv[:at] + argv[at + 2 :]
    _, rest = parser.parse_known_args(flags)
    if rest:
        unknown = [part for part in rest if part.startswith("--")] or rest
        raise ValueError(f"unknown on the command line: {_with_hints(unknown, known)}")
    return argv


def refuse_unknown_keys(path: str, known: set[str]) -> None:
    """Holds the keys of a YAML file, and of its `datasets` entries, against the known ones."""
    import yaml
    from trl.scripts.utils import DatasetConfig

    with open(path) as file:
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected flags and values, got {type(content).__name__}")
    if unknown := [key for key in content if key not in known | {"env"}]:
        raise ValueError(f"unknown in {path}: {_with_hints(unknown, known)}")
    options = {f.name for f in fields(DatasetConfig)}
    for entry in content.get("datasets") or []:
        if unknown := [key for key in entry if key not in options]:
            raise ValueError(f"unknown in datasets in {path}: {_with_hints(unknown, options)}")


def _with_hints(unknown: list[str], known: set[str]) -> str:
    def hint(name: str) -> str:
        plain = name.lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(plain, known, n=1)
        return f"{name} (did you mean {near[0]}?)" if near else name

    return ", ".join(hint(str(name)) for name in unknown)


def local_file_as_mixture(script, mixture) -> None:
    """Lets --dataset_name be a file, which load_dataset reads through a builder alone."""
    from trl.scripts.utils import DatasetConfig

    name = script.dataset_name
    if mixture.datasets or not name or not os.path.isfile(name):
        return
    builder = BUILDERS.get(os.path.splitext(name)[1])
    if builder is None:
        raise ValueError(f"--dataset_name {name}: a file has to end in {', '.join(BUILDERS)}")
    mixture.datasets = [DatasetConfig(path=builder, data_files=name)]
    mixture.streaming = script.dataset_streaming
    script.dataset_name = None


def set_model_init_kwargs(training, model, ours) -> None:
    """Puts the experts implementation and the layout where SFTTrainer hands them to the model."""
    from .. import plans
    from . import layout

    init = dict(training.model_init_kwargs or {})
    name = ours.experts_implementation
    if init.setdefault("experts_implementation", name) != name:
        raise ValueError(
            f"experts_implementation is {init['experts_implementation']!r} in model_init_kwargs "
            f"and {name!r} as a flag; give it as the flag alone"
        )
    plans.require(plans.experts_checks(name))
    rules = layout.take_sizes(ours, init.pop("distributed_config", None) or {})
    config = layout.layout_of(ours, rules, int(os.environ.get("WORLD_SIZE", 1)))
    if (config is not None or name != "eager") and not training.trust_remote_code:
        where = model.model_name_or_path, model.model_revision
        config = layout.config_for(*where, config, name)
    elif config is not None:
        config = layout.DistributedConfig(**config)
    if config is not None:
        init["distributed_config"] = config
        lora = model if model.use_peft else None
        plans.require(plans.training_checks(config, training, lora))
        layout.check_lengths(config, training)
        save_weights_only(training)
    training.model_init_kwargs = init


def save_weights_only(training) -> None:
    """transformers 5.23 refuses to checkpoint the optimizer of a sharded model: keep weights.

    Raises:
        ValueError: asked to resume, which it cannot either.
    """
    if training.resume_from_checkpoint:
        raise ValueError(
            "--resume_from_checkpoint: transformers 5.23 cannot resume a sharded model; start from "
            "saved weights with --model_name_or_path"
        )
    if training.save_strategy != "no" and not training.save_only_model:
        training.save_only_model = True
        if training.process_index == 0:
            print("hf-moe-ep sft: sharded: checkpoints hold the weights only", file=sys.stderr)


def add_telemetry(training) -> None:
    """Puts MoETelemetryCallback before the reporters that the user chose."""
    from ..training import telemetry

    telemetry.register()
    others = [name for name in training.report_to if name != telemetry.REPORT_NAME]
    training.report_to = [telemetry.REPORT_NAME, *others]


if __name__ == "__main__":
    sys.exit(main())
