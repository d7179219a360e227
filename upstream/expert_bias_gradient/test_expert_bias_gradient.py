"""Gradients of the experts' biases in bfloat16, beside float32, with some hundred rows an expert.

`grouped_mm` and `batched_mm` index the biases by every row's expert. The gradient of that is a sum
over the rows in the biases' own dtype, one after the other: in bfloat16 every addition rounds to 8
bits. `eager` adds one bias to all rows of an expert, which sums well.
"""

import pytest


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_expert_bias_gradient(implementation):
    import torch
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2
    )
    x, grad = torch.randn(2, 1024, 64)
    ids = torch.rand(1024, 4).topk(2).indices
    weights = torch.rand(1024, 2)
    start = {}

    def gradients(name, dtype):
        config._experts_implementation = name
        experts = GptOssExperts(config)
        if not start:
            for key, parameter in experts.named_parameters():
                start[key] = torch.randn_like(parameter) * 0.1
        experts.load_state_dict(start)
        experts.to(dtype)
        out = experts(x.to(dtype), ids, weights.to(dtype))
        out.backward(grad.to(dtype))
        return {n: p.grad.float() for n, p in experts.named_parameters() if "bias" in n}

    want = gradients("eager", torch.float32)
    for name in ("eager", implementation):
        for key, got in gradients(name, torch.bfloat16).items():
            error = ((got - want[key]).norm() / want[key].norm()).item()
            assert error < 0.01, f"{name}: {key} is {error:.1%} off in bfloat16"
