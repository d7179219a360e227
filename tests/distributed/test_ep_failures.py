"""A rank that dies, stops or disagrees ends the job on every rank, with an error that says where.

Nothing may hang: every rank must have ended well before the test kills it.
"""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig as UpstreamConfig

from hf_moe_ep.config import DistributedConfig
from tests.distributed.layouts import Case, batches, group_of, load, write_checkpoint
from tests.distributed.survivors import outcomes
from tests.distributed.test_ep_layer import EXPERTS, Block, batch_of, distributed, one_step

WITHIN = 90  # seconds for a launch on a busy machine; a hang is a failure
TIMEOUT = 15  # of the process group


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints"), "qwen3_moe")


def end(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ArithmeticError("on purpose")
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # "stop"


def dying_step(case, folder, how: str, where: str) -> str:
    """One good step, then one in which rank 1 ends in the MoE block of the second layer."""
    model = load(case, folder)
    layer = model.model.layers[1]
    ids = batches("plain", case.config.dp_size)[0][group_of(case)]

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    if where == "before":
        layer.mlp.register_forward_pre_hook(lambda *_: end(how))
    else:  # between dispatch and combine, or their backwards
        gate = layer.mlp.experts._apply_gate

        def ending_gate(x):
            if where == "experts":
                end(how)
            out = gate(x)
            if where == "backward":
                out.register_hook(lambda _: end(how))
            return out

        layer.mlp.experts._apply_gate = ending_gate
    step()
    return "no error"


FAILURES = [
    ("gather", "raise", "before"),
    ("rows", "kill", "experts"),
    ("gather", "exit", "backward"),
]


def check_survivor(folder, exchange, how, where, within=WITHIN):
    case = Case(exchange=exchange)
    survivor, culprit = outcomes(
        2, dying_step, case, folder, how, where, within=within, timeout=TIMEOUT
    )
    assert isinstance(survivor, str) and "Error" in survivor, survivor
    assert "rank 0" in survivor and "MoE layer 1" in survivor, survivor
    if how == "raise":
        assert "on purpose" in culprit
    else:
        assert culprit == {"exit": 3, "kill": -signal.SIGKILL, "stop": None}[how]


@pytest.mark.parametrize(("exchange", "how", "where"), FAILURES)
def test_a_rank_ends_in_the_middle_of_a_step(folder, exchange, how, where):
    check_survivor(folder, exchange, how, where)


@pytest.mark.grid
@pytest.mark.parametrize("exchange", ["gather", "rows"])
@pytest.mark.parametrize("how", ["raise", "exit", "kill"])
@pytest.mark.parametrize("where", ["before", "experts", "backward"])
def test_a_rank_ends_anywhere(folder, exchange, how, where):
    check_survivor(folder, exchange, how, where)


@pytest.mark.grid
@pytest.mark.parametrize("where", ["before", "experts", "backward"])
def test_a_rank_stops_answering(folder, where):
    check_survivor(folder, "rows", "stop", where, within=TIMEOUT + WITHIN)


# --- ranks that disagree ---------------------------------------------------------------------


KINDS = ("dtype", "top_k", "x_grad", "weights_grad")


def disagreeing() -> list[str]:
    """For each kind the error of a layer whose rank 1 gets another kind of input."""
    rank, errors = dist.get_rank(), []
    experts = distributed(Block("fastmoe", torch.float32), "fastmoe", 1)
    for kind in KINDS:
        x, ids, weights, probe = batch_of(rank, 5, 2, "uniform", 2, torch.float32)
        inputs = {
            "dtype": (x.bfloat16() if rank else x, ids, weights),
            "top_k": (x, ids[:, : 2 - rank], weights[:, : 2 - rank]),
            "x_grad": (x.detach().requires_grad_(rank == 0), ids, weights),
            "weights_grad": (x, ids, weights.detach().requires_grad_(rank == 0)),
        }
        try:
            experts(*inputs[kind])
            errors.append("no error")
        except ValueError as error:
            errors.append(str(error))
        one_step(experts, x, ids, weights, probe)  # nobody is stuck in the step before
    dist.barrier()  # the store is gone with rank 0
    return errors


def test_ranks_that_disagree_all_say_so():
    for errors in outcomes(2, disagreeing, within=WITHIN):
        for kind, error in zip(KINDS, errors, strict=True):
            assert f"disagree on {kind} (rank 0:" in error and "rank 1:" in error, error


# --- layouts that do not fit -----------------------------------------------------------------


def loading_error(folder, config, **kwargs) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


def errors_of_layouts(folder, three) -> list[str]:
    layout = dict(fsdp_size=2, ep_size=2)
    no_dispatch = {"model.layers.*.mlp.experts": "replicate"}
    errors = [
        loading_error(three, UpstreamConfig(**layout)),
        loading_error(folder, DistributedConfig(**layout, ep_plan=no_dispatch)),
    ]
    dist.barrier()  # the store is gone with rank 0
    return errors


def test_layouts_that_do_not_fit(folder, tmp_path):
    from tests import families

    config = families.tiny_config(families.family("qwen3_moe"))
    config.num_experts = config.num_local_experts = 3
    model = families.model_class(families.family("qwen3_moe"))(config)
    model.save_pretrained(tmp_path)
    for odd, whole in outcomes(2, errors_of_layouts, folder, tmp_path, within=WITHIN):
        assert "Cannot evenly shard 3 experts across 2 expert-parallel ranks" in odd
        assert "no 'ep_dispatch_experts' rule" in whole and "keep all experts" in whole


def test_unknown_exchange(monkeypatch):
    from hf_moe_ep.expert_parallel.implementation import make_exchange

    monkeypatch.setenv("HF_MOE_EP_EXCHANGE", "pigeons")
    with pytest.raises(ValueError, match="HF_MOE_EP_EXCHANGE=pigeons: use gather or rows"):
        make_exchange(None, EXPERTS)
