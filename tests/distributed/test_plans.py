"""Layouts that `DistributedConfig.for_model` completes: two gloo ranks against one process.

Expert parallelism without tensor parallelism over a shared batch; dense MLPs that the family's own
expert rules would split over a mesh that FSDP2 cannot take; and sequences over the tp axis.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_moe_ep import DistributedConfig
from tests import families
from tests.distributed.ranks import run_ranks

WORLD = 2
REPLICATED = dict(tp_size=2, ep_size=2, tp_plan={})
# (family, layout)
SCENARIOS = [
    ("qwen3_moe", REPLICATED),
    ("deepseek_v3", REPLICATED),  # a dense first layer and shared experts
    ("gpt_oss", REPLICATED),
    ("zaya", REPLICATED),  # no tp rules of its own
    ("gemma4", dict(fsdp_size=2, ep_size=2)),
    ("qwen3_moe", dict(tp_size=2, ep_size=2, enable_sequence_parallel=True)),
]


def batch():
    return torch.randint(3, 128, (WORLD, 12), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def save_model_and_reference(folder, name):
    model = families.tiny_model(families.family(name))
    model.save_pretrained(folder)
    torch.save(loss_and_gradients(model, batch()), folder / "reference.pt")


def errors_against_one_process(folder, name, fields):
    """Name -> relative error, of the loss and of every gradient gathered from the ranks."""
    family = families.family(name)
    config = DistributedConfig.for_model(families.tiny_config(family), **fields)
    model = families.model_class(family).from_pretrained(
        folder, experts_implementation="fastmoe", distributed_config=config
    )
    rank = dist.get_rank()
    ids = batch() if config.tp_size == WORLD else batch()[rank : rank + 1]
    results = loss_and_gradients(model.eval(), ids)
    dist.all_reduce(results["loss"])
    results["loss"] /= WORLD
    results = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in results.items()}
    model.save_pretrained(folder / "saved")
    reference = torch.load(folder / "reference.pt")
    results["output"] = results.pop("loss")
    reference["output"] = reference.pop("loss")
    return families.relative_errors(results, reference)


def check_all(root):
    for name, fields in SCENARIOS:
        errors = errors_against_one_process(root / name, name, fields)
        wrong = {n: e for n, e in errors.items() if not e < 1e-5}  # NaN is wrong
        assert not wrong, f"{name}, {fields}: {wrong}"


def test_two_ranks_match_one_process(tmp_path):
    for name in {name for name, _ in SCENARIOS}:
        save_model_and_reference(tmp_path / name, name)
    run_ranks(WORLD, check_all, tmp_path)
    for name, _ in SCENARIOS:
        family = families.family(name)
        saved = families.model_class(family).from_pretrained(tmp_path / name / "saved")
        before = families.model_class(family).from_pretrained(tmp_path / name)
        for key, value in before.state_dict().items():
            torch.testing.assert_close(saved.state_dict()[key], value, msg=f"{name}: {key}")
