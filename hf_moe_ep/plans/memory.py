"""Peak memory of one GPU in training, part by part, from a model on the meta device.

What torch's allocator hands out (`torch.cuda.max_memory_allocated`); the CUDA context, NCCL and
fragmentation come on top. Routing is taken as balanced. T tokens of a micro-batch on this rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..training.flops import decoder_matmuls
from .activations import Saved, saved_bytes
from .model import experts_modules
from .shards import is_expert, local_shapes

REFERENCE = 128  # tokens; what is kept grows linearly, from forwards of these and of twice as many
# Bytes per parameter: weight, gradient, AdamW's two states, and the copy that layers compute with.
PRECISIONS = {"bf16": (2, 2, 4, 2), "mixed": (4, 4, 8, 2)}


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations`, `gathered`, `ep_buffers` and `logits` are those of the peak."""

    weights: int
    gradients: int  # all of them, as the optimizer sees them
    optimizer: int  # AdamW's two states
    activations: int  # kept for backward: everything, or with checkpointing the layers' inputs
    recomputed: int  # with checkpointing: the layer that is being recomputed
    gathered: int  # whole weights and gradients of the layer that runs, beside the shards
    ep_buffers: int  # rows on their way to and from the experts
    logits: int  # the head: its whole weight, its fp32 gradients
    peak: int  # the largest sum that stands at one moment; gradients replace activations

    @property
    def gib(self) -> float:
        return self.peak / 2**30


class ModelSizes:
    """What memory and time depend on, read from a model on the meta device once."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.to(torch.bfloat16)
        decoder = model.get_decoder()
        self.hidden, self.layers = decoder.config.hidden_size, len(decoder.layers)
        head = model.get_output_embeddings()
        self.vocabulary = head.weight.shape[0] if head is not None else 0
        self.numel = {n: p.numel() for n, p in model.named_parameters()}
        self.layer_of = {n: _layer(n) for n in self.numel}
        self.expert = {n for n in self.numel if is_expert(n, model)}
        experts = experts_modules(model)
        self.sparse = {layer for n in experts if (layer := _layer(n)) is not None}
        self.num_experts = next(m.num_experts for m in experts.values())
        matmuls = {m.name: m.flops for m in decoder_matmuls(decoder) if m.kind == "experts"}
        name, active = next(iter(matmuls.items()))
        stacks = [p.numel() for p in decoder.get_submodule(name).parameters() if p.ndim == 3]
        self.top_k = round(active / (2 * sum(stacks)) * self.num_experts)
        self.attention_width = _attention_width(decoder)

    @cached_property
    def _references(self) -> tuple:
        return saved_bytes(self.model, REFERENCE), saved_bytes(self.model, 2 * REFERENCE)

    def saved(self, tokens: int) -> tuple[list[Saved], int]:
        """`saved_bytes` for a sequence of `tokens`."""
        (once, around), (twice, around_twice) = self._references

        def grown(one: int, two: int) -> int:
            return one + (two - one) * (tokens - REFERENCE) // REFERENCE

        kinds = ("hidden", "inner", "experts")
        layers = [
            Saved(*(grown(getattr(a, kind), getattr(b, kind)) for kind in kinds))
            for a, b in zip(once, twice, strict=True)
        ]
        return layers, grown(around, around_twice)

    def share_of_tokens(self, ep: int) -> float:
        """The part of all tokens that has a choice among one rank's experts, for uniform routing.

        1 - C(E - E / ep, K) / C(E, K): 0.997 for 128 experts, top-8, ep 2; 0.667 for ep 8.
        """
        elsewhere = self.num_experts - self.num_experts // ep
        return 1 - math.comb(elsewhere, self.top_k) / math.comb(self.num_experts, self.top_k)


def _attention_width(decoder: nn.Module) -> int:
    """Elements per token of queries, keys, values and the output of one attention layer."""
    config = decoder.config
    heads = config.num_attention_heads
    value = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    value = value or config.hidden_size // heads
    if getattr(config, "kv_lora_rank", None):  # latent attention: keys and values of every head
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        return heads * (2 * key + 2 * value)
    return 2 * value * (heads + (getattr(config, "num_key_value_heads", None) or heads))


@dataclass(frozen=True)
class Held:
    """Parameters of one rank, in elements; `whole` is what FSDP2 gathers: tp and ep still split."""

    local: int
    whole_by_layer: list[tuple[int, int]]  # (dense, experts)
    local_by_layer: list[int]
    whole: int


def held_parameters(sizes: ModelSizes, config: Any) -> Held:
    """What a rank holds of the model under a layout, and has at hand while a layer runs."""
    dense, experts, own = ([0] * sizes.layers for _ in range(3))
    local = everything = 0
    for name, shape in local_shapes(sizes.model, config).items():
        count, expert = math.prod(shape), name in sizes.expert
        shards = 1 if config.dp_size == 1 else config.efsdp_size if expert else config.fsdp_size
        whole = min(count * shards, sizes.numel[name])
        local, everything = local + count, everything + whole
        if (layer := sizes.layer_of[name]) is not None:
            own[layer] += count
            (experts if expert else dense)[layer] += whole
    return Held(local, list(zip(dense, experts, strict=True)), own, everything)


def _layer(name: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", f"{name}.")
    return int(found[1]) if found else None


def memory(
    sizes: ModelSizes,
    config: Any,
    params: Held,
    seq_len: int,
    checkpointing: bool,
    accumulates: bool = False,
    precision: str = "bf16",
) -> Memory:
    """Peak of one rank that trains on micro-batches of one sequence of `seq_len` tokens.

    config: a DistributedConfig with the rules of this model. params: `held_parameters` of the two.
    accumulates: more than one micro-batch
    a step, for which Trainer keeps gradients unsharded until the last one. precision: "bf16", all
    in bfloat16, or "mixed", fp32 shards that compute in bfloat16.
    """
    weight, gradient, states, computed = PRECISIONS[precision]
    unsharded = accumulates and config.dp_replicate_size == 1
    by_layer = [gradient * n for n in params.local_by_layer]
    all_gradients = gradient * (params.whole if unsharded else params.local)

    kept, around = _kept(sizes, config, seq_len)
    inputs = _tokens(config, seq_len) * sizes.hidden * 2
    ep_buffers = _ep_buffers(sizes, config, seq_len)
    head = _head(sizes, config, seq_len)
    base = params.local * (weight + states)

    per_layer = [inputs] * sizes.layers if checkpointing else kept
    running = kept if checkpointing else [0] * sizes.layers
    gathered = [_gathered(config, *n, gradient, computed) for n in params.whole_by_layer]
    already = all_gradients if accumulates else all_gradients - sum(by_layer)
    # (bytes, layer) at each moment: the head first, then backward from the last layer.
    moments = [(sum(per_layer) + around + head + (all_gradients if accumulates else 0), None)]
    for layer in reversed(range(sizes.layers)):
        if not accumulates:
            already += by_layer[layer]
        backward = sum(per_layer[: layer + 1]) + running[layer] + gathered[layer]
        buffers = ep_buffers if layer in sizes.sparse else 0
        moments.append((already + backward + buffers + 2 * inputs, layer))
    peak, layer = max(moments, key=lambda moment: moment[0])
    return Memory(
        weights=params.local * weight,
        gradients=all_gradients,
        optimizer=params.local * states,
        activations=sum(per_layer) + around,
        recomputed=0 if layer is None else running[layer],
        gathered=0 if layer is None else gathered[layer],
        ep_buffers=ep_buffers,
        logits=head,
        peak=base + peak,
    )


def _tokens(config: Any, seq_len: int) -> int:
    """Tokens whose hidden states this rank keeps between modules."""
    shards = config.tp_size if config.enable_sequence_parallel else config.sp_size
    return math.ceil(seq_len / shards)


def _kept(sizes: ModelSizes, config: Any, seq_len: int) -> tuple[list[int], int]:
    """Bytes that each layer keeps for its backward on this rank, and what stands around them."""
    tokens = math.ceil(seq_len / config.sp_size)
    layers, around = sizes.saved(tokens)
    tp, split = config.tp_size, not is_replicated(config)
    if config.enable_sequence_parallel:  # the input of attention is gathered
        extra = tokens * sizes.hidden * 2 * (tp - 1) // tp
        kept = [saved.total // tp + extra for saved in layers]
        around //= tp
    else:
        inner = tp if split else 1
        kept = [s.hidden + s.inner // inner + s.experts // tp for s in layers]
    rows = _rows(sizes, config, seq_len) * sizes.hidden * 2 if config.ep_size > 1 else 0
    return [k + rows if n in sizes.sparse else k for n, k in enumerate(kept)], around


def is_replicated(config: Any) -> bool:
    """Whether every rank of the tp axis holds all dense modules (tp_plan={} in for_model)."""
    plan = config.tp_plan
    return isinstance(plan, dict) and bool(plan) and set(plan.values()) == {"replicate"}


def _rows(sizes: ModelSizes, config: Any, seq_len: int) -> int:
    """Rows that this rank's experts receive: a token once, from each rank of the ep group."""
    own = math.ceil(seq_len / (config.sp_size * config.tp_size))
    return math.ceil(own * config.ep_size * sizes.share_of_tokens(config.ep_size))


def _ep_buffers(sizes: ModelSizes, config: Any, seq_len: int) -> int:
    """Rows sent and received, in both directions, of the layer that runs."""
    if config.ep_size == 1:
        return 0
    own = math.ceil(seq_len / (config.sp_size * config.tp_size))
    return 2 * (own + _rows(sizes, config, seq_len)) * sizes.hidden * 2


def _head(sizes: ModelSizes, config: Any, seq_len: int) -> int:
    """TRL's fused head: hidden states and their fp32 gradient, the whole weight and its gradient.

    trl/kernels/chunked_logprob.py: logits exist in tiles of a few MiB; gradients are summed in fp32
    and then cast, and FSDP2's or tp's shards of the weight are gathered first.
    """
    shards = config.sp_size  # with sequences over tp, the decoder's output is gathered
    tokens = math.ceil(seq_len / shards)
    gathered = 2 if config.world_size > 1 else 0
    return sizes.hidden * (tokens * (2 + 4 + 2) + sizes.vocabulary * (4 + 2 + gathered))


def _gathered(config: Any, dense: int, experts: int, gradient: int, computed: int) -> int:
    """FSDP2 in the backward of one layer: whole weights and gradients, and what it sends.

    torch/distributed/fsdp/_fully_shard: weights are copied, also where one rank has them whole
    (efsdp 1); the gradient is copied into the reduce-scatter's input, which the next group frees.
    """
    if config.dp_size == 1:
        return 0
    prefetched = dense + (experts if config.efsdp_size > 1 else 0)
    return (experts + dense) * (computed + 2 * gradient) + prefetched * computed
