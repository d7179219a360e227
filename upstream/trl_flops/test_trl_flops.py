"""`compute_flops_per_token` of MoE configs, against the matrix products that a model really runs.

It reads `decoder_sparse_step`, `moe_intermediate_size` and `num_local_experts` from every config
with `num_experts_per_tok`, and takes layers 0, n, 2n for the sparse ones where Qwen has n-1, 2n-1.
"""

import pytest

from upstream.helpers import SIZES, run

CONFIGS = {
    "MixtralConfig": {"num_local_experts": 4},
    "OlmoeConfig": {},
    "Qwen3MoeConfig": {"decoder_sparse_step": 2, "num_hidden_layers": 3},
    "MiniMaxM2Config": {},
}


def flops_match(config_name: str):
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode
    from trl.trainer.utils import compute_flops_per_token

    config_class = getattr(transformers, config_name)
    sizes = {name: size for name, size in SIZES.items() if hasattr(config_class(), name)}
    config = config_class(**sizes | CONFIGS[config_name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 12, dtype=torch.long), use_cache=False)
    counted = 3 * counter.get_total_flops() / 12
    computed = compute_flops_per_token(config, 12)
    assert abs(computed / counted - 1) < 2e-3, f"{config_name}: {computed}, counted {counted}"


@pytest.mark.parametrize("config_name", CONFIGS)
def test_trl_flops(config_name):
    run(1, flops_match, config_name)
