"""Tiny models in expert-parallel layouts, held against one process: what the test_ep_* files share.

The parent writes checkpoints and what one process gets from them in eager; ranks load a checkpoint
in a layout, run batches, and report relative errors. A rank of a tp group sees the batch of its
group; groups see different ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

import hf_moe_ep  # noqa: F401  (registers "fastmoe")
from hf_moe_ep.expert_parallel import implementation, keep_routing
from tests import families
from tests.distributed.ranks import run_ranks

LAYOUTS = {
    "ep2": dict(fsdp_size=2, ep_size=2),
    "tp2=ep2": dict(tp_size=2, ep_size=2),
    "ep4": dict(fsdp_size=4, ep_size=4),
    "tp4=ep4": dict(tp_size=4, ep_size=4),
    "tp2 fsdp2 ep4": dict(tp_size=2, fsdp_size=2, ep_size=4),
    "tp2 fsdp2 ep2": dict(tp_size=2, fsdp_size=2, ep_size=2),
    "fsdp4 ep2": dict(fsdp_size=4, ep_size=2),
    "hsdp ep2": dict(dp_replicate_size=2, fsdp_size=2, ep_size=2),
    "ep8": dict(fsdp_size=8, ep_size=8),
    "tp2 fsdp4 ep8": dict(tp_size=2, fsdp_size=4, ep_size=8),
}
FAMILIES = (
    "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe",
    "ernie4_5_moe", "dots1", "olmoe", "nemotron_h", "aria",
)  # fmt: skip
# Sizes that every layout divides. A variant of a checkpoint is a word after the family's name.
SIZES = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k")
VARIANTS = {"top1": dict(experts=8, top_k=1), "top8": dict(experts=16, top_k=8)}
BOUND = 2e-6
# Gradients that nearly cancel: how far one process in fp32 is from itself in fp64, with eager
# experts, on the batches of four groups (nemotron_h: of two), CPU. Two runs in fp32 may be twice
# that apart. On GPUs, whose sums have other orders, it is measured anew, up to MOST_NOISE: more
# would be a token that fell to another expert.
MOST_NOISE = 1e-5
NOISE = {
    ("nemotron_h", "A_log"): 4.0e-6,
    ("nemotron_h", "dt_bias"): 3.7e-6,
    ("gpt_oss hot", "router.bias"): 7.3e-6,
    ("qwen3_moe top8", "_norm.weight"): 7.1e-6,
}


@dataclass(frozen=True)
class Case:
    """A checkpoint in a layout."""

    checkpoint: str = "qwen3_moe"  # family, and "top1", "top8" or "hot": all on rank 0
    layout: str = "ep2"
    ep: str = "auto"  # ep_implementation
    experts: str = "fastmoe"  # experts_implementation
    exchange: str = "auto"  # HF_MOE_EP_EXCHANGE, unset for "auto"
    batch: str = "plain"  # of `batches`; "checkpointing" adds gradient checkpointing to "unequal"

    @property
    def config(self) -> DistributedConfig:
        return DistributedConfig(**LAYOUTS[self.layout], ep_implementation=self.ep)

    @property
    def world(self) -> int:
        return self.config.dp_size * self.config.tp_size


def device_of(world: int) -> str:
    """Ranks get a GPU each where there are enough."""
    return "cuda" if torch.cuda.device_count() >= world else "cpu"


def backend_of(world: int) -> str:
    return {"cuda": "nccl", "cpu": "gloo"}[device_of(world)]


def batches(kind: str, groups: int) -> list[list[torch.Tensor]]:
    """Token ids (B, L) for every micro-batch and group of ranks that share a batch."""
    shapes = {
        "plain": lambda r: (2, 16),
        "odd": lambda r: (3, 9),
        "unequal": lambda r: (1 + r, 19 - 2 * r),
        "accumulation": lambda r: (2, 11 + 2 * r),
    }
    kind = "unequal" if kind == "checkpointing" else kind
    generator = torch.Generator().manual_seed(2)
    micro_batches = 2 if kind == "accumulation" else 1
    return [
        [torch.randint(3, 128, shapes[kind](r), generator=generator) for r in range(groups)]
        for _ in range(micro_batches)
    ]


# --- the parent: checkpoints and references --------------------------------------------------


def write_checkpoint(root: Path, name: str) -> Path:
    """A folder that ranks load; made once."""
    folder = root / name.replace(" ", "-")
    if not folder.exists():
        tiny_model(name).save_pretrained(folder)
    return folder


def tiny_model(name: str):
    family_name, *variant = name.split()
    family = families.family(family_name)
    config_class = type(families.tiny_config(family))
    sizes = VARIANTS.get(" ".join(variant), dict(experts=8, top_k=2))
    fields = {field.name for field in dataclasses.fields(config_class)}
    wanted = dict.fromkeys(EXPERTS, sizes["experts"]) | dict.fromkeys(TOP_K, sizes["top_k"])
    options = {n: v for n, v in (families.SIZES | SIZES | wanted).items() if n in fields}
    options |= families.OVERRIDES.get(family.name, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = families.model_class(family)._from_config(
            config_class(**options), experts_implementation="eager"
        )
    families.randomise(model)
    if variant == ["hot"]:
        send_all_to_the_first(model, experts=2)
    return model.eval()


def send_all_to_the_first(model, experts: int) -> None:
    """Routers with a bias that makes them choose among the first `experts`, whatever the token."""
    biases = [p for n, p in model.named_parameters() if n.endswith("router.bias")]
    for bias in biases:
        bias.data[experts:] = -100.0
    assert biases, "hot needs a family whose routers have a bias, such as gpt_oss"


def write_reference(root: Path, case: Case) -> Path:
    """What one process gets from the case's batches, and its rounding; made once.

    On CPUs with eager experts. On GPUs on one of them, with the case's experts, so that nothing but
    the layout differs: eager's matrix products and exponentials round otherwise than fastmoe's.
    """
    folder, device = write_checkpoint(root, case.checkpoint), device_of(case.world)
    experts = case.experts if device == "cuda" else "eager"
    path = folder / f"{case.batch}-{case.config.dp_size}-{case.config.tp_size}-{experts}.pt"
    if not path.exists():
        want = reference(folder, case, experts, torch.float32)
        noise = {}
        if device == "cuda":
            wide = reference(folder, case, "eager", torch.float64)
            noise = compare(want, wide)
        torch.save((want, noise), path)
    return path


def reference(folder: Path, case: Case, experts: str, dtype: torch.dtype) -> dict:
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=experts, dtype=dtype
    )
    sum_in_parts(model, case.config.tp_size)
    model.to(device_of(case.world))
    return one_process(model, batches(case.batch, case.config.dp_size))


def sum_in_parts(model, parts: int) -> None:
    """Linear layers that add up as `parts` tp ranks do, on one process.

    In fp32 the order alone moves gradients by up to 2.0e-6 (qwen3_moe, q_proj and gate_up_proj, one
    process against itself, CPU), as much as the bound, and no error of the experts.
    """
    for name, module in model.named_modules():
        style = (model.tp_plan or {}).get(replace_layer_number_by_wildcard(name), "")
        if parts > 1 and isinstance(module, torch.nn.Linear) and "wise" in style:
            module.forward = partial(_in_parts, module, parts, style.startswith("colwise"))


def _in_parts(module, parts: int, by_columns: bool, x):
    if by_columns:  # one input gradient a part
        out = torch.cat([F.linear(x.clone(), w) for w in module.weight.chunk(parts)], -1)
    else:
        pairs = zip(x.chunk(parts, -1), module.weight.chunk(parts, 1), strict=True)
        out = sum(F.linear(part, weight) for part, weight in pairs)
    return out if module.bias is None else out + module.bias


def one_process(model, micro_batches) -> dict:
    """Loss, every part's logits, and every gradient of the mean of the parts' losses."""
    parts = list(itertools.chain(*micro_batches))
    logits, losses = [None] * len(parts), []
    for n, ids in enumerate(parts):
        ids = ids.to(model.device)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        (out.loss / len(parts)).backward()
        logits[n] = out.logits.detach()
        losses.append(out.loss.detach())
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"loss": torch.stack(losses).mean(), "logits": logits} | gradients


class Error(NamedTuple):
    """How far the ranks are from one process."""

    found: float  # largest relative error on any rank. 4.1e-7
    noise: float  # of one process in fp32 against fp64, where it was measured. 0.0

    @property
    def allowed(self) -> float:
        return max(BOUND, 2 * min(self.noise, MOST_NOISE))

    @property
    def wrong(self) -> bool:
        return not self.found < self.allowed  # NaN is


def errors_of(root: Path, cases: list[Case], ranks_per_node: int | None = None) -> dict:
    """(case, what) -> the error of the loss, the logits, each gradient.

    One launch of ranks for all cases, which must be of one world size.
    """
    paths = [write_reference(root, case) for case in cases]
    world = cases[0].world
    env = {"HF_MOE_EP_RANKS_PER_NODE": str(ranks_per_node)} if ranks_per_node else {}
    seconds = 60 + 20 * len(cases)
    ranks = run_ranks(
        world, run_cases, cases, paths, env, timeout=seconds, backend=backend_of(world)
    )
    noises = {case: torch.load(path)[1] for case, path in zip(cases, paths, strict=True)}
    return {
        (case, what): Error(
            _largest(rank[case, what] for rank in ranks),
            max(noises[case].get(what, 0.0), _noise(case, what)),
        )
        for case, what in ranks[0]
    }


def wrong(errors: dict) -> dict:
    """The (case, name) whose errors are beyond their bounds."""
    return {key: error for key, error in errors.items() if error.wrong}


def lines(errors: dict) -> list[str]:
    """The worst of every case, beside its bound."""
    worst = {}
    for (case, what), error in errors.items():
        share = error.found / error.allowed
        if case not in worst or not share <= worst[case][0]:
            worst[case] = share, what, error
    return [
        f"{e.found:.1e} of {e.allowed:.1e} (one process {e.noise:.1e}) {what} {case}"
        for case, (_, what, e) in worst.items()
    ]


def _largest(errors) -> float:
    """NaN where one is."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def _noise(case: Case, name: str) -> float:
    found = [n for (c, end), n in NOISE.items() if c == case.checkpoint and name.endswith(end)]
    return max(found, default=0.0)


# --- the ranks -------------------------------------------------------------------------------


def load(case: Case, folder: Path, **kwargs):
    by_hand = case.exchange != "auto"
    os.environ["HF_MOE_EP_EXCHANGE"] = case.exchange if by_hand else ""
    return AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=case.experts, distributed_config=case.config, **kwargs
    )


def run_cases(cases: list[Case], paths: list[Path], env: dict) -> dict:
    os.environ |= env
    errors, loaded, model = {}, None, None
    for case, path in zip(cases, paths, strict=True):
        try:
            same = dataclasses.replace(case, batch="plain")
            if same != loaded:  # cases of one model follow each other
                with recorded_exchanges() as made:
                    model, loaded = load(case, path.parent), same
                check_exchange(case, made)
            want, _ = torch.load(path, map_location=model.device)
            want["logits"] = want["logits"][group_of(case) :: case.config.dp_size]
            found = compare(run(model, case), want)
            errors |= {(case, what): error for what, error in found.items()}
        except Exception as error:
            error.add_note(str(case))
            raise
    return errors


@contextlib.contextmanager
def recorded_exchanges():
    """The exchanges that are made meanwhile, in order."""
    made, make = [], implementation.make_exchange

    def recording(*args):
        made.append(make(*args))
        return made[-1]

    implementation.make_exchange = recording
    try:
        yield made
    finally:
        implementation.make_exchange = make


def check_exchange(case: Case, made: list) -> None:
    """That the tokens go the way that the case is meant to test."""
    names = {type(e).__name__ for e in made}
    if case.config.ep_size == case.config.tp_size or case.ep.startswith("all_"):
        assert not names, names
    elif case.exchange != "auto":
        assert names == {f"{case.exchange.title()}Exchange"}, names
    elif "HF_MOE_EP_RANKS_PER_NODE" in os.environ:
        assert names == {"NodesExchange"}, names


def run(model, case: Case) -> dict:
    """This rank's logits and loss, and the whole gradients; leaves the model without gradients."""
    use_checkpointing(model, case.batch == "checkpointing")
    mine = [parts[group_of(case)] for parts in batches(case.batch, case.config.dp_size)]
    logits, losses = [], []
    for n, ids in enumerate(mine):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(n == len(mine) - 1)
        ids = ids.to(model.device)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        (out.loss / len(mine)).backward()
        logits.append(out.logits.detach())
        losses.append(out.loss.detach())
    loss = torch.stack(losses).mean()
    dist.all_reduce(loss)
    results = {"loss": loss / dist.get_world_size(), "logits": logits}
    results |= {n: whole(p.grad) for n, p in model.named_parameters()}
    model.zero_grad()
    return results


def use_checkpointing(model, yes: bool) -> None:
    model.train(yes)
    if yes:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": keep_routing})
    elif model.is_gradient_checkpointing:
        model.activation_checkpointing_disable()


def group_of(case: Case) -> int:
    """Which of the batches this rank sees."""
    return dist.get_rank() // case.config.tp_size


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(got: dict, want: dict) -> dict[str, float]:
    pairs = zip(got["logits"], want["logits"], strict=True)
    errors = {"logits": max(families.relative_error(*pair) for pair in pairs)}
    for name in want.keys() - {"logits"}:
        tensor = want[name]
        assert (got[name] is None) == (tensor is None), f"{name}: only one has a gradient"
        if tensor is not None:
            errors[name] = families.relative_error(got[name], tensor)
    return errors
