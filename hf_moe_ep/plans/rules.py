"""Rules for a model's modules: {"model.layers.*.mlp.experts": "ep_dispatch_experts", ...}.

Names are transformers' own, `*` for a layer number; styles are those registered with transformers.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as wildcard

from ..sequence_parallel.megatron import EP_IMPLEMENTATION
from ..sequence_parallel.plan import sp_plan_for
from .model import experts_modules, names_of


def ep_plan(model: PreTrainedModel) -> dict[str, str]:
    """Rules that share out every experts module behind transformers' interface, from its modules.

    Whatever is stacked by expert is sharded; what an experts module applies to all its rows (the
    norm of muse_spark) is replicated with its gradient summed.
    """
    rules = {}
    for name, experts in experts_modules(model).items():
        name = wildcard(name)
        for key, parameter in experts.named_parameters(recurse=False):
            if parameter.shape[0] == experts.num_experts:
                rules[f"{name}.{key}"] = "grouped_gemm"
        for key, child in experts.named_children():
            if any(True for _ in child.parameters()):
                rules[f"{name}.{key}"] = "replicated_with_grad_allreduce"
        rules[name] = "ep_dispatch_experts"
    return rules


def tp_plan(model: PreTrainedModel) -> dict[str, str]:
    """The model's own tensor-parallel rules, as far as they match its modules."""
    names = names_of(model)
    return {rule: style for rule, style in model.tp_plan.items() if rule in names}


def replicate_plan(model: PreTrainedModel) -> dict[str, str]:
    """A tp_plan under which every rank of the tp axis keeps all dense modules whole.

    With ep_size, ranks of the tp axis then share a batch and each holds a part of the experts:
    what `tp_plan={}` means in transformers' documentation, and what 5.23 refuses.
    """
    dense = dict.fromkeys(tp_plan(model), "replicate")
    return dense or {"": "replicate"}  # the model itself


def sp_plan(model: PreTrainedModel) -> dict[str, str]:
    """tp_plan rules that also shard the sequence over the tp axis.

    Raises:
        ValueError: the model has layers for which sequence sharding is not known.
    """
    return sp_plan_for(model)


def complete(model: PreTrainedModel, cls: type, given: dict):
    """cls(**given), a DistributedConfig, with the rules that depend on the model written out."""
    given = dict(given)
    asked = given.get("tp_plan")
    if asked == {} and given.get("tp_size", 1) not in (None, 1):
        given["tp_plan"] = replicate_plan(model)
    if given.get("enable_sequence_parallel"):
        asked = asked if isinstance(asked, dict) else {}
        given["tp_plan"] = sp_plan(model) | asked | (given.get("sp_plan") or {})
        if given.get("ep_implementation", "auto") == "auto":
            given["ep_implementation"] = EP_IMPLEMENTATION
    if given.get("ep_size", 1) not in (None, 1) and given.get("ep_plan") is None:
        missing = {r: s for r, s in ep_plan(model).items() if r not in model.ep_plan}
        if (given.get("fsdp_size") or 1) * (given.get("dp_replicate_size") or 1) > 1:
            missing |= dict.fromkeys(dense_rules(model.ep_plan), "replicate")
        given["ep_plan"] = missing or None
    return cls(**given)


def dense_rules(plan: dict[str, str]) -> list[str]:
    """Rules of an ep_plan that split dense matrices over the ep axis (gemma4's shared MLP).

    FSDP2 shards dense modules over the fsdp axis, which overlaps ep, so the two cannot be combined.
    """
    return [rule for rule, style in plan.items() if style in ("colwise", "rowwise")]
