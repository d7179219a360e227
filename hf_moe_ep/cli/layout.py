"""The flags that `sft` adds to TRL's, and the parallel layout they ask for. A layout that cannot
run is refused here, from the command line and the model's config, before weights are read.

Mesh: dp_replicate x fsdp x tp processes; the experts see them as dp_replicate x efsdp x ep.
"""

from dataclasses import dataclass, field

import torch
import transformers
from transformers import AutoConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .doctor import conflict_checks, divisible

SIZES = ("ep_size", "tp_size", "fsdp_size", "dp_replicate_size")
# Of DistributedConfig's other keys, those that work here: Trainer does not train with pp_size, and
# enable_sequence_parallel does nothing in transformers 5.23.
PLANS = ("tp_plan", "ep_plan", "fsdp_plan", "fsdp_cpu_offload", "fsdp_mixed_precision")


@dataclass
class FastMoEArguments:
    """The flags that TRL does not have; sizes are named as in transformers' DistributedConfig."""

    experts_implementation: str = field(
        default="fastmoe",
        metadata={"help": "What computes the experts: fastmoe, eager, grouped_mm, batched_mm."},
    )
    ep_size: int | None = field(
        default=None,
        metadata={"help": "Processes that share out the experts; divides fsdp_size x tp_size."},
    )
    tp_size: int | None = field(
        default=None, metadata={"help": "Processes that split every dense matrix."}
    )
    fsdp_size: int | None = field(
        default=None,
        metadata={"help": "Processes that shard parameters and batches; default: all that remain."},
    )
    dp_replicate_size: int | None = field(
        default=None, metadata={"help": "Copies of the sharded model (HSDP)."}
    )
    ep_implementation: str = field(
        default="auto",
        metadata={"help": "How tokens reach the experts: auto, all_to_all, all_reduce."},
    )


def take_sizes(args: FastMoEArguments, nested: dict) -> dict:
    """Moves the sizes in `nested`, a distributed_config from model_init_kwargs, to `args`.

    Returns its other keys.

    Raises:
        ValueError: a key that is unknown or does nothing here, or a size given twice.
    """
    usable = (*SIZES, "ep_implementation", *PLANS)
    if unknown := [key for key in nested if key not in usable]:
        raise ValueError(
            f"model_init_kwargs.distributed_config: cannot use {', '.join(unknown)}; usable keys: "
            f"{', '.join(usable)}"
        )
    for name in (*SIZES, "ep_implementation"):
        if name not in nested:
            continue
        flag = getattr(args, name)
        if flag not in (None, "auto", nested[name]):
            raise ValueError(
                f"{name} is {nested[name]!r} in model_init_kwargs.distributed_config and {flag!r} "
                "as a flag; give it once"
            )
        setattr(args, name, nested[name])
    return {key: value for key, value in nested.items() if key in PLANS}


def distributed_config(args: FastMoEArguments, plans: dict, world_size: int) -> dict | None:
    """Arguments of transformers' DistributedConfig for `world_size` processes; None: not sharded.

    An fsdp_size that is not given takes the processes that the other sizes leave.

    Raises:
        ValueError: the sizes do not fit each other, the processes, or the EP implementation.
    """
    implementations = EPImplementationInterface().valid_keys()
    if args.ep_implementation not in implementations:
        raise ValueError(
            f"ep_implementation={args.ep_implementation!r} is unknown; choose one of "
            f"{', '.join(implementations)}"
        )
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    for name, size in given.items():
        if size < 1:
            raise ValueError(f"{name}={size}: give 1 or more")
    if not given:
        unused = [*plans, *(["ep_implementation"] if args.ep_implementation != "auto" else [])]
        if unused:
            raise ValueError(
                f"{', '.join(unused)} does nothing without a layout; give --ep_size, --tp_size or "
                "--fsdp_size too"
            )
        return None
    sizes = dict.fromkeys(SIZES, 1) | given
    if "fsdp_size" not in given:
        sizes["fsdp_size"] = _processes_left(sizes, world_size)
    _check_sizes(sizes, world_size)
    if world_size == 1:
        return None
    if args.ep_implementation == "all_reduce":
        _check_all_reduce(sizes, args.experts_implementation)
    return sizes | {"ep_implementation": args.ep_implementation} | plans


def _processes_left(sizes: dict[str, int], world_size: int) -> int:
    if world_size == 1:  # not launched: the smallest mesh that holds ep, for the refusal to name
        return -(-sizes["ep_size"] // sizes["tp_size"])
    return max(1, world_size // (sizes["tp_size"] * sizes["dp_replicate_size"]))


def _check_sizes(sizes: dict[str, int], world_size: int) -> None:
    mesh = {name: sizes[name] for name in ("dp_replicate_size", "fsdp_size", "tp_size")}
    product = " x ".join(f"{name}={size}" for name, size in mesh.items())
    needed = mesh["dp_replicate_size"] * mesh["fsdp_size"] * mesh["tp_size"]
    try:
        DistributedConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"ep_size={sizes['ep_size']} with {product}: {error}") from None
    if needed != world_size:
        have = "this is one process" if world_size == 1 else f"there are {world_size}"
        raise ValueError(
            f"{product} needs {needed} processes and {have}; start it with `torchrun "
            f"--nproc_per_node {needed} -m hf_moe_ep sft ...` or change the sizes"
        )


def _check_all_reduce(sizes: dict[str, int], experts_implementation: str) -> None:
    if sizes["ep_size"] != sizes["tp_size"]:
        raise ValueError(
            f"ep_implementation='all_reduce' needs ep_size == tp_size, got ep_size="
            f"{sizes['ep_size']}, tp_size={sizes['tp_size']}; make them equal or use "
            "--ep_implementation all_to_all"
        )
    if experts_implementation == "eager":
        raise ValueError(
            "ep_implementation='all_reduce' with experts_implementation='eager' hangs when a rank "
            "gets no token; use --experts_implementation fastmoe"
        )


def check_experts_implementation(name: str) -> None:
    """Raises ValueError for a name that is not registered with transformers."""
    names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if name not in names:
        raise ValueError(
            f"experts_implementation={name!r} is unknown; choose one of {', '.join(names)}"
        )


def check_model(name: str, revision: str | None, config: dict | None) -> None:
    """Holds a model (a folder or hub name) against the layout `config`, from its config alone.

    A model whose class is not in transformers (remote code) is left to the check at loading.

    Raises:
        ValueError: no architecture, no experts behind transformers' interface, no expert-parallel
            plan, or experts or attention heads that the sizes do not divide.
    """
    loaded = AutoConfig.from_pretrained(name, revision=revision)
    if not loaded.architectures:
        raise ValueError(f"{name}: config.json names no `architectures`, and TRL needs one")
    model_class = getattr(transformers, loaded.architectures[0], None)
    if model_class is None:
        return
    with torch.device("meta"):  # no memory: 0.4 s for DeepSeek-V3
        model = model_class(loaded)
    experts = {m.num_experts for m in model.modules() if hasattr(m, "_is_expert_parallel")}
    if not experts:
        raise ValueError(
            f"{name}: {model_class.__name__} has no experts behind transformers' experts "
            "interface, so there is nothing to speed up; --experts_implementation eager trains it"
        )
    sizes = dict.fromkeys(SIZES, 1) | (config or {})
    if sizes["ep_size"] > 1 and not (model.ep_plan or sizes.get("ep_plan")):
        raise ValueError(
            f"{name}: {model_class.__name__} has no expert-parallel plan; use --ep_size 1 or give "
            "ep_plan in model_init_kwargs.distributed_config"
        )
    checks = [divisible("experts", count, "ep_size", sizes["ep_size"]) for count in sorted(experts)]
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(loaded.get_text_config(), heads, None)
        checks += [divisible(heads, count, "tp_size", sizes["tp_size"])] if count else []
    if problems := [f"{check.name}: {check.detail}" for check in checks if check.status != "ok"]:
        raise ValueError(f"{name}: {'; '.join(problems)}")


def check_training(config: dict, args) -> None:
    """Holds an SFTConfig against a model that is sharded by `config`.

    Raises:
        ValueError: something else would shard the model again, or transformers 5.23 would train
            it wrongly or stop later.
    """
    problems = [c.detail for c in conflict_checks() if c.status == "problem"]
    if args.fsdp or args.deepspeed:
        problems.append("--fsdp or --deepspeed would shard a sharded model again; drop it")
    if args.resume_from_checkpoint:
        problems.append(
            "--resume_from_checkpoint: transformers 5.23 cannot resume a sharded model; start from "
            "saved weights with --model_name_or_path"
        )
    if config["tp_size"] > 1 and args.gradient_accumulation_steps > 1:
        problems.append(
            f"tp_size={config['tp_size']} with gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: transformers 5.23 counts gradients of q_norm and "
            "k_norm more than once; use --gradient_accumulation_steps 1 or --tp_size 1"
        )
    if problems:
        raise ValueError("; ".join(problems))
