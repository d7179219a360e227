"""`hf-moe-ep sft`: TRL's own SFT script with fastmoe experts, parallel layouts and telemetry.
Runs as one process, under torchrun, and under `accelerate launch -m hf_moe_ep.cli.sft`."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

from .. import recipes
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
    train(*arguments)
    return 0


def train(script, training, model, mixture) -> None:
    """What TRL's script does with these, by a trainer that saves and resumes sharded models."""
    trainer = make_trainer(script, training, model, mixture)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.end()


def make_trainer(script, training, model, mixture, load: Callable | None = None):
    """The SFTTrainer of `train`, with data and model loaded, before its first step.

    `load(name, **model_init_kwargs)` makes the model, instead of TRL's `from_pretrained`.
    """
    from datasets import load_dataset
    from trl import SFTTrainer, get_dataset, get_peft_config, get_quantization_config

    from ..sequence_parallel import share_batches
    from ..training import FastAdamWMixin, ShardedCheckpointMixin

    adamw = (FastAdamWMixin,) if training.fast_adamw else ()

    class Trainer(*adamw, ShardedCheckpointMixin, SFTTrainer):
        async_save = training.async_save

        def train(self, *args, **kwargs):
            with training.sdpa_order():
                return super().train(*args, **kwargs)

    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | training.model_init_kwargs
    if (layout := training.model_init_kwargs.get("distributed_config")) is not None:
        share_batches(training, layout.sp_size)
    if mixture.datasets:
        data = get_dataset(mixture)
    else:
        options = {"name": script.dataset_config, "streaming": script.dataset_streaming}
        data = load_dataset(script.dataset_name, **options)
    evaluates = training.eval_strategy != "no"
    name = model.model_name_or_path
    return Trainer(
        model=name if load is None else load(name, **training.model_init_kwargs),
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def prepare(argv: list[str]) -> tuple:
    """What `train` takes: ScriptArguments, SFTArguments, ModelConfig and DatasetMixtureConfig.
    Nothing is downloaded but the config of a hub model.

    Raises:
        ValueError: an unknown flag or key, a layout that cannot run, or a checkpoint that cannot
            be resumed from; the message names it.
    """
    from ..training.deepspeed import refuse_autoep

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
    refuse_autoep(training.deepspeed)
    set_model_init_kwargs(training, model, ours)
    find_checkpoint(training)
    add_callbacks(training)
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
        help="Flags and their values, and environment variables under `env`; flags override it. "
        f"Or a recipe: {', '.join(recipes.names())}.",
    )
    return parser


def refuse_unknown(parser, argv: list[str]) -> list[str]:
    """`argv` as TrlParser reads it, once every flag and every key of its --config file is known.

    A --config that names a recipe becomes the recipe's file.

    Raises:
        ValueError: names the flags or keys that are not known, and the nearest that are.
    """
    argv = [p for a in argv for p in (a.split("=", 1) if a.startswith("--config=") else [a])]
    known = {action.dest for action in parser._actions} - {"config", "help"}
    flags = argv
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs the path of a YAML file, or a recipe's name")
        argv[at + 1] = recipes.path(argv[at + 1])
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
    training.model_init_kwargs = init


def find_checkpoint(training) -> None:
    """Makes a folder, or None, of what --resume_from_checkpoint says.

    `true` is the newest checkpoint in output_dir, `auto` the same, or a new start without one.

    Raises:
        ValueError: there is none, or the one of a sharded run is not whole or not one.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from ..training import checkpoint_files, checkpoint_trainer

    sharded = "distributed_config" in training.model_init_kwargs
    if training.async_save and not (sharded and not training.save_only_model):
        raise ValueError(
            "--async_save does nothing without a layout, or with --save_only_model; drop it or "
            "give --ep_size, --tp_size or --fsdp_size"
        )
    place, output = str(training.resume_from_checkpoint or ""), training.output_dir
    if place.lower() in ("true", "auto"):
        folder = get_last_checkpoint(output) if os.path.isdir(output) else None
        if folder is None and place.lower() == "true":
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {output}")
        place = folder
    training.resume_from_checkpoint = place or None
    if place and (sharded or checkpoint_files.is_checkpoint(place)):
        checkpoint_trainer.check_resumable(place)


def add_callbacks(training) -> None:
    """Puts ours before the reporters that the user chose, and makes the others known by name.

    Telemetry always; the routing is kept where activations are recomputed, unless they are so in
    another way or layers are compiled; tokens, if they are counted, count once for ranks that share
    them.
    """
    from ..training import callbacks, recompute, telemetry

    callbacks.register()
    wanted = {
        telemetry.REPORT_NAME: True,
        "keep_routing": training.activation_checkpointing and recompute.can_keep_routing(training),
        "token_counts": training.include_num_input_tokens_seen != "no",
    }
    ours = [name for name, yes in wanted.items() if yes]
    others = [n for n in training.report_to if n not in (*ours, "token_counts")]
    training.report_to = [*ours, *others]


if __name__ == "__main__":
    sys.exit(main())
