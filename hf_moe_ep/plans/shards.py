"""What one rank holds of every parameter under a layout, from the rules alone: no process group.

Dense parameters lie on fsdp x tp, experts on efsdp x ep; transformers shards them the same way.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, _get_parameter_plan
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as wildcard
from transformers.distributed.tensor_parallel import (
    ColwiseParallel,
    EmbeddingParallel,
    PackedColwiseParallel,
    PackedRowwiseParallel,
    RowwiseParallel,
)


def local_shapes(model: PreTrainedModel, config: Any) -> dict[str, tuple[int, ...]]:
    """Parameter name -> its shape on rank 0 (which holds the longest part) under a layout.

    config: a DistributedConfig with the rules of this model (`DistributedConfig.for_model`).
    """
    tp_rules = dict(model.tp_plan, **(config.tp_plan or {})) if config.tp_size > 1 else {}
    ep_rules = dict(model.ep_plan, **(config.ep_plan or {})) if config.ep_size > 1 else {}

    def held(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        expert = _dispatched(name, ep_rules)
        rules = ep_rules if _under(name, ep_rules) else tp_rules
        style = _get_parameter_plan(name, rules, is_weight=True)
        size = config.ep_size if rules is ep_rules else config.tp_size
        shape = _split(shape, name, style, size)
        if shape and config.dp_size > 1:
            shards = config.efsdp_size if expert else config.fsdp_size
            shape = (math.ceil(shape[0] / shards), *shape[1:])
        return shape

    shapes, known = {}, {}  # layers are alike: each kind is worked out once
    for name, parameter in model.named_parameters():
        key = wildcard(name), tuple(parameter.shape)
        if key not in known:
            known[key] = held(*key)
        shapes[name] = known[key]
    return shapes


def is_expert(name: str, model: PreTrainedModel) -> bool:
    """Whether this parameter belongs to an experts module that the model's ep_plan dispatches."""
    return _dispatched(name, model.ep_plan)


def _under(name: str, rules: dict[str, str]) -> bool:
    """Whether a rule names this parameter or a module around it; such take no tp rule."""
    parts = wildcard(name).split(".")
    return any(".".join(parts[:n]) in rules for n in range(1, len(parts) + 1))


def _dispatched(name: str, rules: dict[str, str]) -> bool:
    return _under(name, {r: s for r, s in rules.items() if s == "ep_dispatch_experts"})


def _split(shape: tuple[int, ...], name: str, style: str | None, size: int) -> tuple[int, ...]:
    axis = None if style is None or size == 1 else _split_axis(name, shape, style)
    if axis is None:
        return shape
    axis %= len(shape)
    return (*shape[:axis], math.ceil(shape[axis] / size), *shape[axis + 1 :])


def _split_axis(name: str, shape: tuple[int, ...], style: str) -> int | None:
    """The axis that a registered style shards, None for one that keeps parameters whole."""
    rule = ALL_PARALLEL_STYLES[style]
    if isinstance(rule, ColwiseParallel | PackedColwiseParallel):
        return -2 if len(shape) > 1 else -1
    if isinstance(rule, RowwiseParallel | PackedRowwiseParallel):
        return None if name.endswith(".bias") else -1
    if isinstance(rule, EmbeddingParallel):
        return rule.shard_dim
    return 0 if style == "grouped_gemm" else None
