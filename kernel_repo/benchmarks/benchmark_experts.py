"""fastmoe beside plain PyTorch, one matmul per expert, in the shape `kernels benchmark` runs.

The layer is Qwen3-30B-A3B's on a GPU and a small one on a CPU. The measured comparison with other
libraries is in the project's own benchmarks; this one answers "does it work here, and is it fast".
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


def expert_loop(x, top_k_index, top_k_weights, up, down):
    """(T, H): the same layer, SwiGLU, expert by expert."""
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        token, slot = torch.where(top_k_index == e)
        gate, value = F.linear(x[token], up[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * value, down[e])
        out.index_add_(0, token, y * top_k_weights[token, slot, None])
    return out


class ExpertsBenchmark(Benchmark):
    seed = 0

    def setup(self):
        gpu = self.device != "cpu"
        tokens, hidden, inner, experts, top_k = (
            (4096, 2048, 768, 128, 8) if gpu else (128, 64, 32, 8, 2)
        )
        options = {"device": self.device, "dtype": torch.bfloat16 if gpu else torch.float32}
        logits = torch.randn(tokens, experts, device=self.device)
        weights, self.index = logits.softmax(-1).topk(top_k)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(options["dtype"])
        self.up = torch.randn(experts, 2 * inner, hidden, **options) * hidden**-0.5
        self.down = torch.randn(experts, hidden, inner, **options) * inner**-0.5
        self.x = torch.randn(tokens, hidden, **options)
        self.grad = torch.randn(tokens, hidden, **options)
        self.leaves = (self.x, self.weights, self.up, self.down)

    def setup_training(self):
        self.setup()
        for leaf in self.leaves:
            leaf.requires_grad_()

    def layer(self, function):
        return function(self.x, self.index, self.weights, self.up, self.down)

    def step(self, function):
        """The gradient of x, from a backward through every input."""
        return torch.autograd.grad(self.layer(function), self.leaves, self.grad)[0]

    def benchmark_forward(self):
        self.out = self.layer(self.kernel.fused_experts)

    def verify_forward(self):
        return self.layer(expert_loop)

    def benchmark_training(self):
        self.out = self.step(self.kernel.fused_experts)

    def verify_training(self):
        return self.step(expert_loop)
