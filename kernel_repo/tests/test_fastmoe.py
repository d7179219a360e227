"""A smoke test of the built kernel: forward and every gradient against one matmul per expert."""

import pytest
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 24, 48, 40, 5, 2


def expert_loop(x, top_k_index, top_k_weights, up, down):
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        token, slot = torch.where(top_k_index == e)
        gate, value = F.linear(x[token], up[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * value, down[e])
        out = out.index_add(0, token, y * top_k_weights[token, slot, None])
    return out


@pytest.fixture
def layer():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    weights, index = torch.randn(TOKENS, EXPERTS, generator=g).softmax(-1).topk(TOP_K)
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=g) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=g) * INNER**-0.5
    floats = [t.to(DEVICE).requires_grad_() for t in (x, weights, up, down)]
    return floats[0], index.to(DEVICE), *floats[1:]


@pytest.mark.kernels_ci
def test_forward_and_gradients(fastmoe, layer):
    leaves = [t for t in layer if t.requires_grad]
    grad = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, loop = fastmoe.fused_experts(*layer), expert_loop(*layer)
    torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(loop, leaves, grad)
    for got, want in zip(torch.autograd.grad(ours, leaves, grad), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels_ci
def test_compiles_without_a_graph_break(fastmoe, layer):
    compiled = torch.compile(fastmoe.fused_experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*layer), fastmoe.fused_experts(*layer))


@pytest.mark.kernels_ci
def test_wrong_shapes_are_refused(fastmoe, layer):
    x, index, weights, up, down = layer
    with pytest.raises(ValueError, match="top_k_weights"):
        fastmoe.fused_experts(x, index, weights[:, :1], up, down)
