"""Gradients, clipping and optimizer steps of sharded models, two micro-batches a step, against one
process in eager. Ranks of one tp group hold the same sequences, all others different ones.
"""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce

from hf_moe_ep.training import AdamW, clip_grad_norm_, param_groups
from tests import families
from tests.distributed.ranks import run_ranks

LAYOUTS = [  # of two ranks
    dict(tp_size=2),
    dict(tp_size=2, ep_size=2),
    dict(fsdp_size=2, ep_size=2),
]
GRID = [  # of four ranks
    dict(tp_size=2, fsdp_size=2),
    dict(tp_size=2, fsdp_size=2, ep_size=2),
    dict(tp_size=2, fsdp_size=2, ep_size=4),
    dict(fsdp_size=4, ep_size=2),
    dict(dp_replicate_size=2, fsdp_size=2, ep_size=2),
]
SEQUENCES = 8
MICRO_BATCHES = 2
STEPS = 3
MAX_NORM = 0.05  # well below the norm of every step, so that all of them clip
# eps as large as the gradients: with a tiny one Adam divides near-zero gradients by their own size,
# and their rounding becomes the update.
ADAMW = dict(lr=1e-2, weight_decay=0.1, eps=1e-3)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, 128, (SEQUENCES, 12), generator=generator)


def backward(model, ids, dp_size=1, dp_rank=0):
    """Gradients of the mean loss over `ids` (SEQUENCES, 12), in MICRO_BATCHES parts per rank."""
    parts = ids.view(MICRO_BATCHES, dp_size, -1, ids.shape[1])[:, dp_rank]
    for n, part in enumerate(parts):
        last = n == MICRO_BATCHES - 1
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        (loss / MICRO_BATCHES).backward()


def gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(model, adamw, **rank):
    """STEPS clipped AdamW steps: norms before clipping, and the parameters after the last step."""
    optimizer = adamw(param_groups(model, **ADAMW))
    norms = []
    for step in range(STEPS):
        backward(model, batch(step), **rank)
        norms.append(clip_grad_norm_(model.parameters(), MAX_NORM))
        clipped = clip_grad_norm_(model.parameters(), math.inf)
        assert torch.allclose(clipped, torch.tensor(MAX_NORM), rtol=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms)} | {
        n: whole(p).detach() for n, p in model.named_parameters()
    }


def reference_training(model):
    """`train` on one process with nothing but torch's own functions, all sequences at once."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **ADAMW)
    norms = []
    for step in range(STEPS):
        model(input_ids=batch(step), labels=batch(step), use_cache=False).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": torch.stack(norms)} | {n: p.detach() for n, p in model.named_parameters()}


def tiny_model():
    family = families.family("qwen3_moe")
    config = families.tiny_config(family)
    config.num_experts = 8  # the six of tiny_model do not divide by four ranks
    model = families.model_class(family)._from_config(config, experts_implementation="eager")
    families.randomise(model)
    return model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    model = tiny_model()
    model.save_pretrained(folder)
    model(input_ids=batch(0), labels=batch(0), use_cache=False).loss.backward()
    torch.save(gradients(model), folder / "gradients.pt")
    torch.save(reference_training(tiny_model()), folder / "trained.pt")
    return folder


def load(model_dir, layout):
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, experts_implementation="eager", distributed_config=DistributedConfig(**layout)
    )
    data = {"dp_size": dist.get_world_size() // layout.get("tp_size", 1)}
    data["dp_rank"] = dist.get_rank() // layout.get("tp_size", 1)
    return model, data


def wrong(actual, expected, bound):
    errors = {n: families.relative_error(actual[n], want) for n, want in expected.items()}
    return {n: e for n, e in errors.items() if not e < bound}  # NaN is wrong


def check(model_dir, layouts):
    for layout in layouts:
        model, data = load(model_dir, layout)
        backward(model, batch(0), **data)
        bad = wrong(gradients(model), torch.load(model_dir / "gradients.pt"), 1e-5)
        assert not bad, f"{layout}: gradients {bad}"
        for adamw in (partial(torch.optim.AdamW, foreach=True), AdamW):
            model, data = load(model_dir, layout)
            bad = wrong(train(model, adamw, **data), torch.load(model_dir / "trained.pt"), 1e-5)
            assert not bad, f"{layout}: training by {adamw} {bad}"


def wrong_with_upstream_style(model_dir, layout):
    name = "replicated_with_grad_allreduce"
    ours = ALL_PARALLEL_STYLES[name]
    ALL_PARALLEL_STYLES.register(name, ReplicatedWithGradAllReduce())
    with contextlib.ExitStack() as stack:
        stack.callback(ALL_PARALLEL_STYLES.register, name, ours)
        model, data = load(model_dir, layout)
        backward(model, batch(0), **data)
    return wrong(gradients(model), torch.load(model_dir / "gradients.pt"), 1e-5)


def check_two(model_dir):
    check(model_dir, LAYOUTS)
    return wrong_with_upstream_style(model_dir, LAYOUTS[0])


def test_two_ranks_match_one_process(model_dir):
    bad, _ = run_ranks(2, check_two, model_dir)
    layers = range(2)
    norms = {f"model.layers.{n}.self_attn.{q}_norm.weight" for n in layers for q in "qk"}
    assert set(bad) == norms, (
        "without our style exactly these are wrong, or the style is not needed"
    )
    assert min(bad.values()) > 0.1


@pytest.mark.grid
def test_four_ranks_match_one_process(model_dir):
    run_ranks(4, check, model_dir, GRID)


def test_decayed_parameters_are_those_of_the_trainer():
    from transformers import Trainer

    for name in ("qwen3_moe", "gpt_oss"):
        model = families.tiny_model(families.family(name))
        names = {p: n for n, p in model.named_parameters()}
        groups = param_groups(model, weight_decay=0.1, lr=0.5)
        decayed = {names[p] for g in groups if g["weight_decay"] for p in g["params"]}
        assert decayed == set(Trainer.get_decay_parameter_names(None, model))
        assert all(g["lr"] == 0.5 for g in groups)
        assert sorted(n for g in groups for n in map(names.get, g["params"])) == sorted(
            names.values()
        )


def test_frozen_parameters_are_in_no_group():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter"):
        param_groups(model)
    model.bias.requires_grad_()
    assert param_groups(model, 0.1) == [{"params": [model.bias], "weight_decay": 0.0}]


def test_clip_grad_norm_is_torchs_on_one_process():
    ours, theirs = (torch.nn.Linear(8, 8) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model(torch.ones(4, 8)).square().sum().backward()
    want = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    assert torch.allclose(clip_grad_norm_(ours.parameters(), 0.5), want)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad)


def test_clip_grad_norm_refuses_and_reports():
    weight = torch.nn.Parameter(torch.ones(2))
    assert clip_grad_norm_(weight, 1.0) == 0  # no gradient yet
    assert clip_grad_norm_([], 1.0) == 0
    with pytest.raises(ValueError, match="max_norm=-1"):
        clip_grad_norm_(weight, -1)
    weight.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(FloatingPointError, match="norm is nan"):
        clip_grad_norm_(weight, 1.0, error_if_nonfinite=True)
    assert weight.grad[0] == 1
