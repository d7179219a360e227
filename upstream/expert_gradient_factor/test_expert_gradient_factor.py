"""Gradients of experts without copies (ep_size = fsdp_size), under FSDP2, in fp16 and in fp64.

transformers sets a divide factor on them, the number of data-parallel ranks. Outside fp32 and bf16
FSDP2 divides in two parts, before and after its reduction; for a group of one rank it reduces
nothing and divides once more.
"""

import pytest

from upstream.helpers import full, run, sharded, tiny_model, tokens


def experts_gradients(model):
    ids = tokens(2)
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: full(p.grad).double() for n, p in model.named_parameters() if "mlp.experts" in n}


def gradients_match_one_process(dtype: str):
    import torch
    from transformers.distributed import DistributedConfig

    def made():
        model = tiny_model().to(getattr(torch, dtype))
        model.set_experts_implementation("eager")  # the others know no fp64
        return model

    expected = experts_gradients(made())
    model = sharded(
        made(),
        distributed_config=DistributedConfig(fsdp_size=2, ep_size=2),
        experts_implementation="eager",
    )
    actual = experts_gradients(model)
    wrong = {
        name: round((actual[name].norm() / want.norm()).item(), 2)
        for name, want in expected.items()
        if not (actual[name] - want).norm() < 0.05 * want.norm()
    }
    assert not wrong, f"experts' gradient norm over that of one process: {wrong}"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_expert_gradient_factor(dtype):
    run(2, gradients_match_one_process, dtype)
