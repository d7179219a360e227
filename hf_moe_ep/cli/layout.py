"""The flags that `sft` adds to TRL's, and the DistributedConfig they ask for. A layout that cannot
run is refused here, from the command line and the model's config, before weights are read.

Mesh: dp_replicate x fsdp x tp processes; the experts see them as dp_replicate x efsdp x ep.
"""

from dataclasses import dataclass, field

from transformers import AutoConfig

from .. import plans
from ..config import DistributedConfig

SIZES = ("ep_size", "tp_size", "fsdp_size", "dp_replicate_size", "sp_size")
CHOICES = ("enable_sequence_parallel", "ep_implementation")
# Of DistributedConfig's other keys, those that work here: Trainer does not train with pp_size.
PLANS = ("tp_plan", "ep_plan", "sp_plan", "fsdp_plan", "fsdp_cpu_offload", "fsdp_mixed_precision")


@dataclass
class FastMoEArguments:
    """The flags that TRL does not have; sizes are named as in transformers' DistributedConfig."""

    experts_implementation: str = field(
        default="fastmoe",
        metadata={
            "help": "What computes the experts: fastmoe, fastmoe_lean (keeps its input alone for "
            "backward), eager, grouped_mm, batched_mm."
        },
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
    sp_size: int | None = field(
        default=None,
        metadata={"help": "Processes of fsdp_size that share each sequence (Ulysses)."},
    )
    enable_sequence_parallel: bool = field(
        default=False,
        metadata={"help": "With tp_size: shard the sequence between its matrices too."},
    )
    ep_implementation: str = field(
        default="auto",
        metadata={"help": "How tokens reach the experts: auto, fastmoe, all_to_all, all_reduce."},
    )


def take_sizes(args: FastMoEArguments, nested: dict) -> dict:
    """Moves the sizes in `nested`, a distributed_config from model_init_kwargs, to `args`.

    Returns its other keys.

    Raises:
        ValueError: a key that is unknown or does nothing here, or a size given twice.
    """
    usable = (*SIZES, *CHOICES, *PLANS)
    if unknown := [key for key in nested if key not in usable]:
        raise ValueError(
            f"model_init_kwargs.distributed_config: cannot use {', '.join(unknown)}; usable keys: "
            f"{', '.join(usable)}"
        )
    for name in (*SIZES, *CHOICES):
        if name not in nested:
            continue
        flag = getattr(args, name)
        if flag not in (None, False, "auto", nested[name]):
            raise ValueError(
                f"{name} is {nested[name]!r} in model_init_kwargs.distributed_config and {flag!r} "
                "as a flag; give it once"
            )
        setattr(args, name, nested[name])
    return {key: value for key, value in nested.items() if key in PLANS}


def layout_of(args: FastMoEArguments, rules: dict, world_size: int) -> dict | None:
    """Arguments of DistributedConfig for `world_size` processes; None: not sharded.

    An fsdp_size that is not given takes the processes that the other sizes leave.

    Raises:
        ValueError: the sizes do not fit each other, the processes, or the EP implementation.
    """
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    choices = {name: getattr(args, name) for name in CHOICES}
    if not given:
        plain = DistributedConfig(ep_implementation=args.ep_implementation)
        unused = [*rules, *(n for n in CHOICES if choices[n] != getattr(plain, n))]
        unused += ["ep_implementation"] if args.ep_implementation != "auto" else []
        if unused:
            raise ValueError(
                f"{', '.join(unused)} does nothing without a layout; give --ep_size, --tp_size or "
                "--fsdp_size too"
            )
        return None
    sizes = dict.fromkeys(SIZES, 1) | given
    if "fsdp_size" not in given and min(sizes.values()) > 0:
        sizes["fsdp_size"] = _processes_left(sizes, world_size)
    # Its rules come from the model, later; here the sizes alone are held against each other.
    mesh = DistributedConfig(**sizes, ep_implementation=args.ep_implementation)
    plans.require(plans.world_checks(mesh, world_size))
    return None if world_size == 1 else sizes | choices | rules


def _processes_left(sizes: dict[str, int], world_size: int) -> int:
    if world_size == 1:  # not launched: the smallest mesh that holds ep and sp, to be named
        return max(-(-sizes["ep_size"] // sizes["tp_size"]), sizes["sp_size"])
    return max(1, world_size // (sizes["tp_size"] * sizes["dp_replicate_size"]))


def config_for(
    name: str, revision: str | None, fields: dict | None, experts_implementation: str
) -> DistributedConfig | None:
    """Holds a model (a folder or hub name) against a layout, from its config alone.

    Returns the layout with the rules that the model needs, None where `fields` is None.

    Raises:
        ValueError: no architecture, no experts behind transformers' interface, or a layout that
            does not fit the model.
    """
    if not AutoConfig.from_pretrained(name, revision=revision).architectures:
        raise ValueError(f"{name}: config.json names no `architectures`, and TRL needs one")
    model = plans.meta_model(name, revision)
    config = plans.complete(model, DistributedConfig, fields or {})
    checks = plans.model_checks(model, config)
    plans.require(checks + plans.experts_checks(experts_implementation, config), name)
    return None if fields is None else config
