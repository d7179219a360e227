"""`experts_implementation="fastmoe_lean"` under expert parallelism: our exchange, the same bits."""

import torch
import torch.distributed as dist
from transformers.distributed import expert_parallel as upstream

from tests.distributed.ranks import run_ranks
from tests.distributed.test_ep_layer import COUNTS, Block, batch_of, distributed, one_step


def saved_rows(experts, batch):
    """The results of a step, and the floats kept between: how many, counted by their elements."""
    elements = 0

    def count(t):
        nonlocal elements
        elements += t.numel() if t.is_floating_point() else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        return one_step(experts, *batch), elements


def both_kinds() -> tuple[int, int]:
    def not_ours(*args):
        raise AssertionError("transformers' own expert parallelism ran")

    upstream.AutoEP.__call__ = not_ours  # in this rank's process alone
    experts = distributed(Block("fastmoe", torch.float32), "auto", 1)
    rank = dist.get_rank()
    batch = batch_of(rank, COUNTS["odd and unequal"](rank), 4, "uniform", 2, torch.float32)
    want, kept = saved_rows(experts, batch)
    experts.config._experts_implementation = "fastmoe_lean"
    got, kept_lean = saved_rows(experts, batch)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert want["output"].any()
    return kept, kept_lean


def test_lean_experts_give_the_same_bits_and_keep_less():
    for kept, kept_lean in run_ranks(2, both_kinds):
        assert kept_lean < kept
