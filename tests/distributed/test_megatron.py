"""Megatron-style sequence parallelism on the tp axis: gloo ranks against one process.

In fp64 to its rounding. In fp32 to BOUND, but for gradients that fp32 itself does not hold to it:
q_norm's and k_norm's are sums over tokens and heads that nearly cancel. At tp 4 one process is
2.05e-6 from its fp64 self there, the ranks are 2.45e-6 (dense and sparse layers; packed: 1.39e-6
and 1.29e-6), and the two runs 3.9e-6 (2.2e-6) from each other. No order of the sums mends that.
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
    errors_of,
    make_model,
    packed,
    padded,
    references_of,
    results,
    save_references,
    sharded_results,
)

FP64_BOUND = 1e-12
FP32_INSIDE = {"deepseek_v2"}  # whose rotary embedding and gate compute in fp32 whatever comes in
NO_FURTHER = 1.5  # times as far from fp64 as one process, where BOUND is below fp32's rounding
EAGER = {"experts_implementation": "eager"}
FASTMOE = {"experts_implementation": "fastmoe"}
CASES = {
    "even": Case((batch(2, 12),), load=EAGER),
    "odd": Case((batch(2, 13),), load=EAGER),
    "padding": Case((padded(2, 15),), load=EAGER),
    "packed": Case((packed(4, 6, 3),), load=EAGER),
    "dense and sparse layers": Case((batch(2, 13),), config={"mlp_only_layers": [0]}, load=EAGER),
    "replicated attention, sinks": Case((padded(2, 13),), family="gpt_oss", load=FASTMOE),
    "latent attention, shared expert": Case((batch(2, 13),), family="deepseek_v2", load=EAGER),
    "norms over all heads": Case((batch(2, 13),), family="olmoe", load=EAGER),
    "auxiliary loss": Case((batch(2, 13) | {"output_router_logits": True},), load=EAGER),
    "two steps": Case((batch(2, 13), padded(2, 9)), load=EAGER),
    "checkpointing": Case((batch(2, 13),), load=EAGER, checkpointing=True),
}


def cases(tp_size: int, dtype: torch.dtype) -> dict[str, Case]:
    heads = {"num_key_value_heads": 4} if tp_size == 4 else {}  # as many as tp splits
    return {
        name: replace(case, config=case.config | heads, dtype=dtype)
        for name, case in CASES.items()
        if dtype == torch.float32 or case.load == EAGER  # no fused experts in fp64
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


def layouts(*grid: tuple[int, int, int]):
    """(ranks, tp_size, ep_size): two ranks always, more with the grid."""
    return pytest.mark.parametrize(
        ("world", "tp_size", "ep_size"),
        [(2, 2, 2), *(pytest.param(*sizes, marks=pytest.mark.grid) for sizes in grid)],
    )


def run(root, world: int, tp_size: int, ep_size: int, chosen: dict[str, Case]):
    """What one process gets from every case, and what every rank does."""
    saved = save_references(root, chosen)
    load = partial(load_megatron, tp_size, ep_size)
    ranks = run_ranks(world, sharded_results, load, saved, chosen, tp_size, timeout=240)
    assert all(rank.keys() == chosen.keys() for rank in ranks)
    return references_of(saved), ranks


def fp64_bound(case: Case, name: str) -> float:
    """Transformers computes every loss in fp32."""
    return BOUND if name == "loss" or case.family in FP32_INSIDE else FP64_BOUND


@layouts((4, 4, 4), (4, 2, 2))  # FSDP2 divides fp64 gradients of experts without copies twice
def test_fp64_gradients_are_those_of_one_process(tmp_path, world, tp_size, ep_size):
    chosen = cases(tp_size, torch.float64)
    want, ranks = run(tmp_path, world, tp_size, ep_size, chosen)
    wrong = {
        (name, gradient): error
        for rank in ranks
        for name, got in rank.items()
        for gradient, error in errors_of(got, want[name]).items()
        if not error < fp64_bound(chosen[name], gradient)
    }
    assert not wrong


@layouts((4, 4, 4), (4, 2, 4), (4, 2, 2))
def test_fp32_gradients_are_those_of_one_process(tmp_path, world, tp_size, ep_size):
    chosen = cases(tp_size, torch.float32)
    want, ranks = run(tmp_path, world, tp_size, ep_size, chosen)
    wrong = {}
    for name, case in chosen.items():
        exact = results(make_model(case).double(), case.batches)
        lost = errors_of(want[name], exact)
        for rank in ranks:
            errors, ours = errors_of(rank[name], want[name]), errors_of(rank[name], exact)
            wrong |= {
                (name, gradient): f"{error:.2e}; {ours[gradient]:.2e} from fp64, one process "
                f"{lost[gradient]:.2e}"
                for gradient, error in errors.items()
                if not (error < BOUND or ours[gradient] < NO_FURTHER * lost[gradient])
            }
    assert not wrong
