"""The layout of a sharded model: transformers' DistributedConfig with sequence parallelism, refused
where it is made if its sizes or plans cannot work, and completed from the model by `for_model`.

Mesh: pp x dp_replicate x fsdp x tp processes; experts see pp x dp_replicate x efsdp x ep of them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import distributed
from transformers.distributed.expert_parallel import EPImplementationInterface

from .sequence_parallel.megatron import EP_IMPLEMENTATION

SIZES = ("ep_size", "tp_size", "fsdp_size", "dp_replicate_size", "pp_size", "sp_size")


@dataclass(repr=False)
class DistributedConfig(distributed.DistributedConfig):
    """transformers' `DistributedConfig` plus sequence parallelism; goes wherever that one goes.

    Two ways to spread a sequence over GPUs, never both:

    - `sp_size=N` (Ulysses, arXiv:2309.14509): N consecutive ranks of the fsdp axis hold shards of
      the same sequences, for tp_size=1. N divides fsdp_size.
    - `enable_sequence_parallel=True` (Megatron-LM's, arXiv:2205.05198): what the tp axis replicates
      between its matrices is sharded along the sequence, for tp_size > 1. Its rules depend on the
      model: make the config with `for_model`.

    Args beyond transformers' own:
        sp_size: ranks that share a sequence; default 1.
        sp_plan: rules, as in tp_plan, that override those that enable_sequence_parallel adds.

    Raises:
        ValueError: sizes that do not fit each other, an unknown ep_implementation, or a combination
            that transformers 5.23 gets wrong; the message says what to change.
    """

    sp_size: int | None = None
    sp_plan: dict[str, str] | None = None

    def __post_init__(self):
        given = ", ".join(f"{n}={v}" for n in SIZES if (v := getattr(self, n)) is not None)
        if self.sp_size is not None and self.sp_size < 1:
            raise ValueError(f"sp_size={self.sp_size}: give 1 or more")
        if self.enable_expert_parallel and self.ep_size is None:
            raise ValueError("enable_expert_parallel=True is no longer enough; give ep_size too")
        self.sp_size = self.sp_size or 1
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None
        problems = [*_sequence_problems(self), *_expert_problems(self), *_plan_problems(self)]
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def world_size(self) -> int:
        """Processes that the layout needs."""
        return self.pp_size * self.dp_replicate_size * self.fsdp_size * self.tp_size

    @classmethod
    def for_model(
        cls,
        model: Any,
        purpose: Literal["training", "inference"] | None = None,
        world_size: int | None = None,
        gpus_per_node: int = 8,
        **given,
    ) -> DistributedConfig:
        """A layout for one model, complete with the rules its modules need, and checked.

        `model`: a hub name, a folder, a config.json, a transformers config or a model; nothing but
        the config is read. With `purpose`, sizes that are not `given` are chosen for `world_size`
        processes (default: WORLD_SIZE): inference gets tp and ep over all of them, training gets
        ep inside a node and fsdp over all. `tp_plan={}` replicates every dense module over the tp
        axis, which is expert parallelism without tensor parallelism.

        Raises:
            ValueError: what the layout cannot do with this model, and what to change.
        """
        from . import plans

        meta = plans.meta_model(model)
        if purpose is not None:
            given = plans.default_layout(meta, purpose, world_size, gpus_per_node, given)
        config = plans.complete(meta, cls, given)
        plans.require(plans.model_checks(meta, config))
        return config

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> DistributedConfig:
        """As transformers', but an unknown key is refused instead of ignored.

        Raises:
            ValueError: names the keys that are not known, and the nearest that are.
        """
        given = config_dict | kwargs
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in given if key not in known]:
            near = {k: difflib.get_close_matches(k, known, n=1) for k in unknown}
            hints = [f"{k} (did you mean {n[0]}?)" if n else k for k, n in near.items()]
            raise ValueError(f"{cls.__name__}: unknown {', '.join(hints)}; known: {known}")
        return cls(**given)

    def _validate_resolved_ep_plan(self, ep_plan: dict[str, str]):
        """What transformers calls with a model's expert rules, before any weight is read."""
        super()._validate_resolved_ep_plan(ep_plan)
        if self.ep_size > 1 and "ep_dispatch_experts" not in ep_plan.values():
            raise ValueError(
                f"ep_size={self.ep_size}: the ep_plan {ep_plan} has no 'ep_dispatch_experts' rule, "
                "so every rank would keep all experts; leave ep_plan out, or give that rule"
            )


def _sequence_problems(c: DistributedConfig) -> list[str]:
    problems = []
    if c.sp_size > 1 and c.tp_size > 1:
        problems.append(
            f"sp_size={c.sp_size} with tp_size={c.tp_size}: use sp_size with tp_size=1, or "
            "enable_sequence_parallel=True, which shards the sequence over the tp axis"
        )
    if c.sp_size > 1 and c.pp_size > 1:
        problems.append(f"sp_size={c.sp_size} with pp_size={c.pp_size} is not supported")
    if c.fsdp_size % c.sp_size:
        fits = [n for n in range(1, c.fsdp_size + 1) if c.fsdp_size % n == 0]
        problems.append(
            f"sp_size={c.sp_size} does not divide fsdp_size={c.fsdp_size}, whose ranks share the "
            f"sequences; choose sp_size among {fits}"
        )
    if c.enable_sequence_parallel and c.tp_size == 1:
        problems.append(
            "enable_sequence_parallel=True shards the sequence over the tp axis, and tp_size is 1; "
            "give tp_size, or sp_size instead"
        )
    if c.enable_sequence_parallel and c.tp_plan is None:
        problems.append(
            "enable_sequence_parallel=True needs rules that depend on the model; make the config "
            "with hf_moe_ep.DistributedConfig.for_model(model, ...)"
        )
    if c.enable_sequence_parallel and c.tp_plan is not None:
        if c.ep_implementation != EP_IMPLEMENTATION:
            problems.append(
                f"ep_implementation={c.ep_implementation!r} takes tokens that the tp axis shares; "
                f"with enable_sequence_parallel=True use {EP_IMPLEMENTATION!r}"
            )
        if c.ep_size < c.tp_size:
            problems.append(
                f"enable_sequence_parallel=True has no rules for experts that tp splits, got "
                f"ep_size={c.ep_size} with tp_size={c.tp_size}; give ep_size, a multiple of tp_size"
            )
    if c.sp_plan is not None and not c.enable_sequence_parallel:
        problems.append("sp_plan does nothing without enable_sequence_parallel=True")
    return problems


def _expert_problems(c: DistributedConfig) -> list[str]:
    problems = []
    implementations = EPImplementationInterface().valid_keys()
    if c.ep_implementation not in implementations:
        problems.append(
            f"ep_implementation={c.ep_implementation!r} is unknown; choose one of "
            f"{', '.join(implementations)}"
        )
    if c.ep_implementation == "all_reduce" and c.ep_size != c.tp_size:
        problems.append(
            f"ep_implementation='all_reduce' needs ep_size == tp_size, got ep_size={c.ep_size}, "
            f"tp_size={c.tp_size}; make them equal or use ep_implementation='all_to_all'"
        )
    if c.pp_size > 1 and c.ep_size > 1:
        problems.append(
            f"pp_size={c.pp_size} with ep_size={c.ep_size} is not supported by transformers 5.23; "
            "use pp_size=1 and shard with fsdp_size"
        )
    return problems


def _plan_problems(c: DistributedConfig) -> list[str]:
    problems = []
    for name in ("tp_plan", "sp_plan"):
        plan = getattr(c, name)
        if isinstance(plan, dict) and "sequence_parallel" in plan.values():
            rules = [rule for rule, style in plan.items() if style == "sequence_parallel"]
            problems.append(
                f"{name}: the style 'sequence_parallel' of transformers 5.23 makes the gradients "
                f"of {rules} tp_size times too large; use enable_sequence_parallel=True instead"
            )
    if c.tp_plan == {} and c.tp_size > 1:
        problems.append(
            f"tp_plan={{}} with tp_size={c.tp_size}: transformers 5.23 refuses an empty plan; make "
            "the config with hf_moe_ep.DistributedConfig.for_model(model, tp_plan={}, ...), which "
            "writes out that dense modules are replicated"
        )
    return problems
