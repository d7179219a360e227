"""The cases that kernel tests and benchmarks share, each named once, and their random inputs.

Shapes: x (T, H), ids and routing weights (T, K), up weights (E, U, H) with U = 2I for gated experts
and I without a gate, down weights (E, H, I); transposed problems store (E, H, U) and (E, I, H).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

GPT_OSS_ALPHA = 1.702  # in its activation, x * sigmoid(alpha * x)


@dataclass(frozen=True)
class Problem:
    """One experts layer. `sentinels` is the share of slots that point at experts of other ranks."""

    name: str
    T: int
    H: int
    I: int  # noqa: E741 - the shape legend's own name
    E: int
    K: int
    skew: float = 0.0  # exponent of a Zipf prior over the experts; 0 is uniform
    routing: str = "random"  # "random" | "one_expert" | "few_experts"
    sentinels: float = 0.0
    # Activation of the gate, or of an ungated expert; "clamped" is gpt-oss's gate.
    gate: str | None = "silu"
    limit: float = 1.0  # of "clamped"; unit inputs reach 1, not the 7 of the models
    gated: bool = True
    bias: bool = False
    transposed: bool = False
    interleaved: bool = False

    @property
    def flops(self) -> int:
        """Multiply-adds of the forward GEMMs, times two; a training step does three times that."""
        return 2 * self.T * self.K * (3 if self.gated else 2) * self.H * self.I

    @property
    def plain(self) -> bool:
        """SwiGLU, gate half first, no biases, no sentinels: what every implementation computes."""
        usual = self.gate == "silu" and self.gated and self.T > 0 and not self.sentinels
        return usual and not (self.bias or self.transposed or self.interleaved)

    @property
    def of_gpt_oss(self) -> bool:
        """gpt-oss's own gate and layout: transposed weights, gate and up in pairs, biases."""
        layout = self.bias and self.transposed and self.interleaved
        return layout and self.gate == "clamped" and self.T > 0 and not self.sentinels

    @property
    def gate_options(self) -> dict[str, object]:
        """What `fastmoe.Gate` is made of."""
        if self.gate == "clamped":
            return dict(
                activation="silu", alpha=GPT_OSS_ALPHA, limit=self.limit, up_offset=1.0,
                interleaved=self.interleaved,
            )  # fmt: skip
        return dict(activation=self.gate, gated=self.gated, interleaved=self.interleaved)

    def at(self, tokens: int) -> Problem:
        return replace(self, T=tokens)


@dataclass
class Inputs:
    x: torch.Tensor  # (T, H)
    top_k_index: torch.Tensor  # (T, K) int64; ids >= E are sentinels
    top_k_weights: torch.Tensor  # (T, K), zero at sentinels
    up: torch.Tensor  # (E, U, H) or (E, H, U)
    down: torch.Tensor  # (E, H, I) or (E, I, H)
    up_bias: torch.Tensor | None  # (E, U)
    down_bias: torch.Tensor | None  # (E, H)
    grad: torch.Tensor  # (T, H), the gradient that backward starts from

    def leaves(self) -> dict[str, torch.Tensor]:
        """The differentiable inputs by name, in the order gradients are compared."""
        names = ("x", "top_k_weights", "up", "down", "up_bias", "down_bias")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


# Real shapes: (H, I, E, K) from the models' own configs. DeepSeek-V3 with an eighth of its experts,
# as under EP=8.
QWEN3_30B = Problem("qwen3-30b-a3b", 16384, 2048, 768, 128, 8)
OLMOE = Problem("olmoe-1b-7b", 8192, 2048, 1024, 64, 8)
GPT_OSS_20B = Problem("gpt-oss-20b-size", 8192, 2880, 2880, 32, 4)
OF_GPT_OSS = dict(gate="clamped", bias=True, transposed=True, interleaved=True)
DEEPSEEK_V3_8 = Problem("deepseek-v3-eighth", 8192, 7168, 2048, 32, 8)
MIXTRAL = Problem("mixtral-8x7b", 8192, 4096, 14336, 8, 2)

TRAINING = (
    QWEN3_30B.at(4096),
    QWEN3_30B,
    QWEN3_30B.at(32768),
    replace(QWEN3_30B, name="qwen3-30b-a3b-zipf", skew=1.0),
    OLMOE,
    GPT_OSS_20B,
    replace(GPT_OSS_20B, name="gpt-oss-20b", limit=7.0, **OF_GPT_OSS),
    DEEPSEEK_V3_8,
    MIXTRAL,
)
DECODE = tuple(QWEN3_30B.at(t) for t in (1, 4, 16, 64))

_SMALL = Problem("small", 40, 32, 48, 6, 2)
EDGE = (
    _SMALL,
    replace(_SMALL, name="no_tokens", T=0),
    replace(_SMALL, name="one_token", T=1),
    replace(_SMALL, name="one_hot_expert", routing="one_expert"),
    replace(_SMALL, name="empty_experts", E=16, routing="few_experts"),
    replace(_SMALL, name="top1", K=1),
    replace(_SMALL, name="top16", T=9, E=16, K=16),
    replace(_SMALL, name="odd_sizes", T=37, H=33, I=27, E=5, K=3),
    replace(_SMALL, name="tile_plus_one", T=129, H=65, I=65, E=3, K=2),
    replace(_SMALL, name="sentinels", sentinels=0.5),
    replace(_SMALL, name="all_sentinels", sentinels=1.0),
    replace(_SMALL, name="skewed", T=200, skew=1.5),
    replace(_SMALL, name="interleaved", interleaved=True),
    replace(_SMALL, name="transposed", transposed=True),
    replace(_SMALL, name="transposed_odd", T=37, H=33, I=27, transposed=True),
    replace(_SMALL, name="bias", bias=True),
    replace(_SMALL, name="gpt_oss", **OF_GPT_OSS),
    replace(_SMALL, name="gpt_oss_sentinels", sentinels=0.4, **OF_GPT_OSS),
    replace(_SMALL, name="privacy_filter", gate="clamped", bias=True, transposed=True),
    replace(_SMALL, name="geglu", gate="gelu"),
    replace(_SMALL, name="geglu_tanh", gate="gelu_tanh"),
    replace(_SMALL, name="reglu", gate="relu"),
    replace(_SMALL, name="ungated_relu2", gated=False, gate="relu2"),
    replace(_SMALL, name="ungated_silu_bias", gated=False, gate="silu", bias=True),
)


def make_routing(
    p: Problem, device: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k ids without repetition and renormalised weights, fp32.

    Sentinels get id E + something and weight 0.
    """
    logits = torch.randn(p.T, p.E, generator=generator, device=device)
    if p.skew:
        logits = logits - p.skew * torch.arange(1, p.E + 1, device=device).float().log()
    if p.routing == "few_experts":
        logits[:, torch.arange(p.E, device=device) % 4 != 1] -= 1e4
    weights, ids = logits.softmax(-1).topk(p.K, -1)
    if p.routing == "one_expert":
        ids = torch.full_like(ids, p.E - 2)
    weights = weights / weights.sum(-1, keepdim=True)
    if p.sentinels:
        off_rank = torch.rand(ids.shape, generator=generator, device=device) < p.sentinels
        ids = torch.where(off_rank, p.E, ids)
        weights = weights.masked_fill(off_rank, 0.0)
    return ids, weights


def make_inputs(p: Problem, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of unit variance with weights scaled so that every activation stays near 1."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=gen, device=device, dtype=torch.float32) * scale).to(
            dtype
        )

    rows = 2 * p.I if p.gated else p.I
    up_shape = (p.E, p.H, rows) if p.transposed else (p.E, rows, p.H)
    down_shape = (p.E, p.I, p.H) if p.transposed else (p.E, p.H, p.I)
    ids, weights = make_routing(p, device, gen)
    return Inputs(
        x=randn(p.T, p.H),
        top_k_index=ids,
        top_k_weights=weights.to(dtype),
        up=randn(*up_shape, scale=p.H**-0.5),
        down=randn(*down_shape, scale=p.I**-0.5),
        up_bias=randn(p.E, rows, scale=0.5) if p.bias else None,
        down_bias=randn(p.E, p.H, scale=0.5) if p.bias else None,
        grad=randn(p.T, p.H),
    )
