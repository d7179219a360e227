"""tp_plan rules for sequence parallelism on the tp axis, from a model's modules."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as wildcard

REPLICATED = "replicated_with_grad_allreduce"
OUTPUTS = {"rowwise": "sp_rowwise", "rowwise_split_input": "sp_rowwise_split_input"}


def sp_plan_for(model: PreTrainedModel) -> dict[str, str]:
    """Rules to put over the model's tp_plan: {"model.layers.*": "sp_layer", ...}.

    `model` may be on the meta device. Attention keeps its tensor parallelism. Norms, routers, dense
    and shared MLPs are replicated over the tp axis; each rank runs them on its own tokens, and
    their gradients are summed. Experts need `ep_size`, a multiple of tp_size, and
    `ep_implementation="sequence_sharded"`.

    Raises:
        ValueError: a model without a decoder of layers with self_attn, with modules of its own
            around them, or with an indexer in them.
    """
    decoder = model.get_decoder()
    root = next(name for name, module in model.named_modules() if module is decoder)
    layers = getattr(decoder, "layers", None)
    if not root or not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__}: sequence parallelism needs `model.layers`")
    rules = {root: "sp_decoder", f"{root}.layers.*": "sp_layer"}
    for name, module in decoder.named_children():
        if any(True for _ in module.parameters()) and name not in ("layers", "embed_tokens"):
            if not name.endswith("norm"):
                raise ValueError(
                    f"{type(model).__name__}: `{root}.{name}` stands beside the layers, and "
                    "whether it sees whole sequences is not known; use sp_size instead"
                )
            rules[f"{root}.{name}"] = REPLICATED
    for number, layer in enumerate(layers):
        rules |= _layer_rules(model, layer, f"{root}.layers.{number}")
    return rules


def _layer_rules(model: PreTrainedModel, layer: nn.Module, name: str) -> dict[str, str]:
    if not hasattr(layer, "self_attn"):
        kinds = [child for child, _ in layer.named_children()]
        raise ValueError(
            f"{type(model).__name__}: {name} has no `self_attn` but {kinds}; sequence parallelism "
            "on the tp axis knows attention layers only"
        )
    rules = {}
    for child, module in layer.named_modules():
        if child.endswith("indexer"):
            raise ValueError(
                f"{type(model).__name__}: {name}.{child} chooses among all tokens of a sequence, "
                "and its gradients would be wrong with sequence parallelism on the tp axis"
            )
        inside = child.split(".")
        if inside[0] == "self_attn" or "experts" in inside:
            continue
        if child and next(module.parameters(recurse=False), None) is not None:
            rules[wildcard(f"{name}.{child}")] = REPLICATED
    return rules | _attention_rules(model.tp_plan, layer.self_attn, wildcard(f"{name}.self_attn"))


def _attention_rules(plan: dict[str, str], attention: nn.Module, name: str) -> dict[str, str]:
    output = plan.get(f"{name}.o_proj")
    if output not in OUTPUTS:
        return {name: "sp_attention_replicated"}
    linear = [n for n, m in attention.named_modules() if isinstance(m, nn.Linear) and n != "o_proj"]
    columns = all(plan.get(f"{name}.{n}") == "colwise" for n in linear)
    style = "sp_attention" if columns else "sp_attention_gathered"
    return {f"{name}.o_proj": OUTPUTS[output], name: style}
