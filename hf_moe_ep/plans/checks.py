"""What a layout cannot do with a model or with a trainer's arguments, found from configs alone.

One home for `hf-moe-ep sft`, `doctor`, `plan` and `DistributedConfig.for_model`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as wildcard
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .. import versions
from ..training.flops import recurrence
from .model import experts_modules, names_of
from .rules import dense_rules

QUERY_HEADS = ("num_attention_heads", "swa_num_attention_heads")
KEY_HEADS = ("num_key_value_heads", "swa_num_key_value_heads")
REGIONS = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
LAUNCHERS = {
    "ACCELERATE_USE_FSDP": "accelerate's FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's ParallelismConfig",
}


@dataclass(frozen=True)
class Check:
    section: str  # "model"
    name: str  # "experts"
    status: Literal["ok", "note", "problem"]
    detail: str  # "128 over ep_size=8: 16 each"


def require(checks: Iterable[Check], subject: str = "") -> None:
    """Raises ValueError with the details of all problems among `checks`; `subject` goes before."""
    if problems := [f"{c.name}: {c.detail}" for c in checks if c.status == "problem"]:
        raise ValueError("; ".join(([subject] if subject else []) + problems))


def model_checks(model: PreTrainedModel, config: Any, seq_len: int | None = None) -> list[Check]:
    """Holds a model (on any device) against a DistributedConfig, and a sequence length in tokens.

    Experts by ep; heads by tp and sp; the sequence by tp or sp; rules that match nothing or leave
    experts whole; layers that cannot see a part of a sequence.
    """
    experts = experts_modules(model)
    if not experts:
        detail = (
            f"{type(model).__name__} has no experts behind transformers' experts interface, so "
            "there is nothing to speed up; experts_implementation='eager' trains it"
        )
        return [Check("model", "experts", "problem", detail)]
    counts = sorted({m.num_experts for m in experts.values()})
    checks = [divisible("experts", count, "ep_size", config.ep_size) for count in counts]
    sizes = {"tp_size": config.tp_size, "sp_size": getattr(config, "sp_size", None)}
    plan = _merged(model.tp_plan, config.tp_plan)
    checks += head_checks(model, sizes, plan) + _plan_checks(model, config)
    return checks + _sequence_checks(model, config, seq_len)


def head_checks(model: PreTrainedModel, sizes: dict, plan: dict | None = None) -> list[Check]:
    """Attention heads by tp, where its rules (default: the model's) shard them, and by sp."""
    plan = model.tp_plan if plan is None else plan
    text = model.config.get_text_config()
    tp, sp = sizes.get("tp_size") or 1, sizes.get("sp_size") or 1
    projections = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value")
    splits = any(k.rsplit(".")[-1] in projections and "colwise" == s for k, s in plan.items())
    checks = []
    for field in QUERY_HEADS:
        heads = getattr(text, field, None)
        if isinstance(heads, int) and (splits or sp > 1):
            checks += [divisible(field, heads, "tp_size", tp)] if splits else []
            checks += [divisible(field, heads, "sp_size", sp)] if sp > 1 else []
    for field in KEY_HEADS:
        heads = getattr(text, field, None)
        if not isinstance(heads, int):
            continue
        if splits and get_kv_heads_per_rank(plan, heads, tp) != heads:
            checks.append(divisible(field, heads, "tp_size", tp))
    return checks


def divisible(what: str, count: int, axis: str, size: int) -> Check:
    if count % size == 0:
        return Check("model", what, "ok", f"{count} over {axis}={size}: {count // size} each")
    fits = [n for n in range(1, count + 1) if count % n == 0]
    detail = f"{count} do not divide by {axis}={size}; choose {axis} among {fits}"
    return Check("model", what, "problem", detail)


def _merged(own: dict, override: Any) -> dict:
    """The model's rules with the config's, as transformers merges them."""
    return own | override if isinstance(override, dict) else own


def _plan_checks(model: PreTrainedModel, config: Any) -> list[Check]:
    checks = []
    overrides = {kind: getattr(config, kind) for kind in ("tp_plan", "ep_plan", "fsdp_plan")}
    overrides = {kind: plan for kind, plan in overrides.items() if isinstance(plan, dict)}
    names = names_of(model) if overrides else set()
    for kind, override in overrides.items():
        for rule in sorted(override.keys() - names - getattr(model, kind).keys()):
            near = difflib.get_close_matches(rule, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            detail = f"{rule!r} matches nothing in {type(model).__name__}{hint}"
            checks.append(Check("model", kind, "problem", detail))
    if config.tp_size > 1 and not _merged(model.tp_plan, config.tp_plan):
        detail = (
            f"{type(model).__name__} has no tensor-parallel rules; use tp_size=1, or tp_plan={{}} "
            "in DistributedConfig.for_model, which keeps dense modules whole on every rank"
        )
        checks.append(Check("model", "tp_plan", "problem", detail))
    return checks + (_expert_rules(model, config) if config.ep_size > 1 else [])


def _expert_rules(model: PreTrainedModel, config: Any) -> list[Check]:
    """Experts that the merged ep_plan leaves whole on every rank, which transformers accepts."""
    plan, checks = _merged(model.ep_plan, config.ep_plan), []
    if not plan:
        detail = f"{type(model).__name__} has no expert-parallel rules; pass ep_plan, or ep_size=1"
        return [Check("model", "ep_plan", "problem", detail)]
    for name in {wildcard(n): m for n, m in experts_modules(model).items()}:
        if (style := plan.get(name)) != "ep_dispatch_experts":
            detail = (
                f"{name!r} has the style {style!r} and would stay whole on every rank; give it "
                "'ep_dispatch_experts'. Another way of moving tokens is an ep_implementation"
            )
            checks.append(Check("model", "ep_plan", "problem", detail))
    if config.dp_size > 1 and (dense := dense_rules(plan)):
        detail = (
            f"{dense} split dense modules over ep, which FSDP2 cannot shard again; give them "
            "'replicate' in ep_plan, as DistributedConfig.for_model does"
        )
        checks.append(Check("model", "ep_plan", "problem", detail))
    return checks


def _sequence_checks(model: PreTrainedModel, config: Any, seq_len: int | None) -> list[Check]:
    sp = getattr(config, "sp_size", None) or 1
    checks = []
    if sp > 1 and (name := _stateful(model)):
        detail = (
            f"{name} looks along the sequence other than by attention; with sp_size={sp} a rank "
            "would see only its part of it; use sp_size=1"
        )
        checks.append(Check("model", "sp_size", "problem", detail))
    axis, size = ("tp_size", config.tp_size) if config.enable_sequence_parallel else ("sp_size", sp)
    if seq_len is not None and size > 1:
        checks.append(length_check(seq_len, axis, size))
    return checks


def _stateful(model: PreTrainedModel) -> str | None:
    """The first layer of the text path that reads tokens before its own other than by attention."""
    decoder = model.get_decoder()
    for name, module in decoder.named_modules():
        # A learned indexer chooses keys of the whole sequence, and makes no Ulysses exchange.
        if isinstance(module, nn.Conv1d) or recurrence(module) or name.endswith("indexer"):
            return name
    return None


def length_check(seq_len: int, axis: str, size: int) -> Check:
    padded = -(-seq_len // size) * size
    detail = f"{seq_len} over {axis}={size}: {padded // size} each"
    if padded == seq_len:
        return Check("model", "sequence length", "ok", detail)
    return Check("model", "sequence length", "note", f"{detail}, after padding to {padded}")


def world_checks(config: Any, world_size: int) -> list[Check]:
    """Holds the mesh of a DistributedConfig against the number of processes."""
    mesh = {n: getattr(config, f"{n}_size") for n in ("dp_replicate", "fsdp", "tp")}
    product = " x ".join(f"{name}_size={size}" for name, size in mesh.items())
    needed = mesh["dp_replicate"] * mesh["fsdp"] * mesh["tp"] * config.pp_size
    if needed == world_size:
        return [Check("layout", "world size", "ok", f"{needed} processes: {product}")]
    have = "this is one process" if world_size == 1 else f"there are {world_size}"
    detail = (
        f"{product} needs {needed} processes and {have}; start it with `torchrun "
        f"--nproc_per_node {needed} ...` or change the sizes"
    )
    return [Check("layout", "world size", "problem", detail)]


def experts_checks(name: str, config: Any = None) -> list[Check]:
    """Holds an experts_implementation against the registered ones, and against a layout."""
    names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if name not in names:
        detail = f"experts_implementation={name!r} is unknown; choose one of {', '.join(names)}"
        return [Check("model", "experts", "problem", detail)]
    if name == "eager" and config is not None and config.ep_implementation == "all_reduce":
        detail = (
            "ep_implementation='all_reduce' with experts_implementation='eager' hangs when a rank "
            "gets no token; use experts_implementation='fastmoe'"
        )
        return [Check("model", "experts", "problem", detail)]
    return []


def conflict_checks() -> list[Check]:
    """Launchers that would shard a model a second time, after transformers sharded it at load."""
    checks = []
    for variable, launcher in LAUNCHERS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on", "t"):
            detail = (
                f"{variable} is on: {launcher} would shard again what transformers shards at load; "
                "choose a launch configuration without it, or drop the layout"
            )
            checks.append(Check("conflicts", launcher, "problem", detail))
    if deepspeed := versions.installed("deepspeed"):
        detail = f"{deepspeed}: its AutoEP replaces MoE blocks and bypasses fastmoe; leave it off"
        checks.append(Check("conflicts", "deepspeed", "note", detail))
    return checks


def training_checks(config: Any, args: Any, lora: Any = None) -> list[Check]:
    """Holds transformers' TrainingArguments, and LoRA's targets, against a sharded model.

    config: a DistributedConfig. lora: whatever has target_modules and target_parameters (a peft
    LoraConfig, or TRL's ModelConfig with its lora_ names), or None.
    """
    found = conflict_checks()
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        detail = (
            "--fsdp or --deepspeed would shard a sharded model again; drop it: FSDP2 with expert "
            "parallelism is --fsdp_size N --ep_size N"
        )
        found.append(Check("training", "fsdp", "problem", detail))
    if str(getattr(args, "optim", "")).rsplit(".", 1)[-1].lower() == "adafactor":
        detail = "Adafactor cannot step sharded parameters (DTensor); use --optim adamw_torch_fused"
        found.append(Check("training", "optim", "problem", detail))
    if getattr(args, "torch_compile", False) and parse_flag_from_env(REGIONS):
        detail = (
            f"{REGIONS} makes accelerate copy the layers, which sharded ones do not survive; leave "
            "it out: torch_compile alone compiles sharded layers one by one too"
        )
        found.append(Check("training", "torch_compile", "problem", detail))
    return found + (_lora_checks(config, lora) if lora is not None else [])


def _lora_checks(config: Any, lora: Any) -> list[Check]:
    """What peft's adapters cannot do on sharded layers; each seen to fail with peft 0.19."""
    tp, sharded = config.tp_size, config.fsdp_size * config.dp_replicate_size > 1
    modules, parameters = _targets(lora, "target_modules"), _targets(lora, "target_parameters")
    problems = []
    if (parameters or "all-linear" in modules) and (config.ep_size > 1 or tp > 1):
        problems.append(
            f"{parameters or modules} adapts the stacked experts, and peft cannot multiply their "
            f"shards (ep_size={config.ep_size}, tp_size={tp}); target attention modules by name, "
            "or use fsdp_size alone"
        )
    if tp > 1 and (rows := [m for m in modules if m.rsplit(".")[-1] in ("o_proj", "down_proj")]):
        problems.append(
            f"{rows} with tp_size={tp}: peft gets the wrong shape where layers are split by rows; "
            "leave them out, or use tp_size=1"
        )
    if tp > 1 and sharded:
        problems.append(
            f"tp_size={tp} with fsdp_size={config.fsdp_size}: peft gets the wrong shape under both "
            "together; use tp_size=1"
        )
    return [Check("training", "lora", "problem", detail) for detail in problems]


def _targets(lora: Any, name: str) -> list[str]:
    found = getattr(lora, name, None) or getattr(lora, f"lora_{name}", None) or []
    return [found] if isinstance(found, str) else list(found)
