"""Megatron-style sequence parallelism on the tp axis: gloo ranks against one process.

In fp64 without FSDP2: in fp32, another order of tp's sums moves the gradients of a tiny q_norm by
up to 4e-6.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

import hf_moe_ep  # noqa: F401  (registers the styles)
from hf_moe_ep.sequence_parallel import sp_plan_for
from tests import families
from tests.distributed.ranks import run_ranks
from tests.distributed.test_ulysses import (
    BOUND,
    Case,
    batch,
    make_model,
    packed,
    padded,
    save_references,
    worst_errors,
)

# No fused experts in fp64; gpt-oss, without norms in its attention, is held to the bound in fp32.
Fp64 = partial(Case, load={"experts_implementation": "eager"}, dtype=torch.float64)
FASTMOE = {"experts_implementation": "fastmoe"}
CASES = {
    "even": Fp64((batch(2, 12),)),
    "odd": Fp64((batch(2, 13),)),
    "padding": Fp64((padded(2, 15),)),
    "packed": Fp64((packed(4, 6, 3),)),
    "dense and sparse layers": Fp64((batch(2, 13),), config={"mlp_only_layers": [0]}),
    "replicated attention, sinks": Case((padded(2, 13),), family="gpt_oss", load=FASTMOE),
    "latent attention, shared expert": Fp64((batch(2, 13),), family="deepseek_v2"),
    "norms over all heads": Fp64((batch(2, 13),), family="olmoe"),
    "auxiliary loss": Fp64((batch(2, 13) | {"output_router_logits": True},)),
    "two steps": Fp64((batch(2, 13), padded(2, 9))),
    "checkpointing": Fp64((batch(2, 13),), checkpointing=True),
}


def cases(tp_size: int, groups: int) -> dict[str, Case]:
    heads = {"num_key_value_heads": 4} if tp_size == 4 else {}  # as many as tp splits
    found = {name: replace(case, config=case.config | heads) for name, case in CASES.items()}
    if groups == 1:
        return found
    # FSDP2 (torch 2.13) divides fp64 gradients of experts twice; Mixtral has no such norms.
    return {
        name: replace(c, dtype=torch.float32, family=c.family.replace("qwen3_moe", "mixtral"))
        for name, c in found.items()
        if not c.config
    }


def load_megatron(tp_size: int, ep_size: int, folder, case: Case):
    layout = DistributedConfig(
        tp_size=tp_size,
        fsdp_size=dist.get_world_size() // tp_size,
        ep_size=ep_size,
        tp_plan=sp_plan_for(make_model(case)),
        ep_implementation="sequence_sharded",
    )
    model_class = families.model_class(families.family(case.family))
    return model_class.from_pretrained(folder, distributed_config=layout, **case.load)


@pytest.mark.parametrize(
    ("world", "tp_size", "ep_size"),
    [
        (2, 2, 2),
        pytest.param(4, 4, 4, marks=pytest.mark.grid),
        pytest.param(4, 2, 4, marks=pytest.mark.grid),
        pytest.param(4, 2, 2, marks=pytest.mark.grid),
    ],
)
def test_every_gradient_is_that_of_one_process(tmp_path, world, tp_size, ep_size):
    chosen = cases(tp_size, world // tp_size)
    saved = save_references(tmp_path, chosen)
    load = partial(load_megatron, tp_size, ep_size)
    worst = run_ranks(world, worst_errors, load, saved, chosen, tp_size, timeout=240)[0]
    assert worst.keys() == chosen.keys()
    assert not {name: error for name, error in worst.items() if not error[1] < BOUND}
