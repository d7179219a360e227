"""Time of a training step under a layout, from FLOPs, bytes and rates measured on H200s.

An estimate to rank layouts by: routing is balanced, FSDP2's traffic hides behind compute, all other
traffic does not. T tokens of a rank's micro-batch, H hidden, K experts a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..training.flops import FlopCount
from .memory import Held, ModelSizes, is_replicated


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links do. Defaults: NVIDIA H200s, bf16, torch 2.11, November 2026.

    The network's is a nominal 400 Gbit/s adapter per GPU; no run has crossed nodes.
    """

    dense: float = 650e12  # FLOP/s of plain matrix products
    experts: float = 530e12  # FLOP/s of fastmoe's step at 16,384 tokens of Qwen3-30B-A3B
    # FLOP/s that sdpa's flash kernel tends to with long sequences, forward and backward, causal,
    # and the tokens at which it does half: 230e12 at 4096; whole steps at 32,768 fit 416e12.
    attention: float = 470e12
    attention_half: float = 4300
    head: float = 437e12  # FLOP/s of a chunked loss with its projection
    elementwise: float = 1.55e-10  # s per token and hidden unit of a layer: norms, rotary, residual
    optimizer: float = 1.1e12  # B/s through fused AdamW, clipping and Trainer's work around a step
    nvlink: float = 386e9  # B/s a GPU: puts through symmetric memory
    collective: float = 254e9  # B/s a GPU: NCCL inside a node, 256 MiB
    network: float = 50e9  # B/s a GPU between nodes


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, and bytes that one GPU sends in it."""

    compute: float  # matrix products, attention, elementwise; recomputation included
    experts_traffic: float  # rows to the experts and back
    sequence_traffic: float  # tp's reductions, or Ulysses' exchanges around attention
    fsdp_exposed: float  # what FSDP2 sends beyond the time that compute takes
    optimizer: float
    nvlink_bytes: float
    network_bytes: float

    @property
    def step(self) -> float:
        traffic = self.experts_traffic + self.sequence_traffic + self.fsdp_exposed
        return self.compute + traffic + self.optimizer


def speed(
    sizes: ModelSizes,
    config: Any,
    params: Held,
    seq_len: int,
    checkpointing: bool,
    flops: FlopCount,
    micro_batches: int,
    gpus_per_node: int,
    rates: Rates,
    precision: str = "bf16",
) -> Speed:
    """One step of `micro_batches` sequences of `seq_len` tokens on every group that shares one."""
    passes = 4 if checkpointing else 3
    links = _Links(gpus_per_node, rates)
    compute = _compute(sizes, flops, config, seq_len, passes, rates) * micro_batches
    experts = _experts_traffic(sizes, config, seq_len, passes, links, micro_batches)
    sequence = _sequence_traffic(sizes, config, seq_len, passes, links, micro_batches)
    fsdp = _fsdp_traffic(config, params, links, micro_batches)
    held = params.local * (14 if precision == "bf16" else 28)
    return Speed(
        compute=compute,
        experts_traffic=experts,
        sequence_traffic=sequence,
        fsdp_exposed=max(0.0, fsdp - compute),
        optimizer=held / rates.optimizer,
        nvlink_bytes=links.inside,
        network_bytes=links.outside,
    )


class _Links:
    """Sums what one GPU sends inside its node and to others, and gives the time it takes."""

    def __init__(self, gpus_per_node: int, rates: Rates):
        self.gpus_per_node, self.rates = gpus_per_node, rates
        self.inside = self.outside = 0.0

    def seconds(self, inside: float, outside: float, rate: float) -> float:
        self.inside, self.outside = self.inside + inside, self.outside + outside
        return max(inside / rate, outside / self.rates.network)

    def exchange(self, per_peer: float, ranks: int, rate: float) -> float:
        """Each of `ranks` consecutive GPUs sends `per_peer` bytes to each other one."""
        near = min(ranks, self.gpus_per_node)
        return self.seconds(per_peer * (near - 1), per_peer * (ranks - near), rate)

    def ring(self, size: float, ranks: int, stride: int) -> float:
        """`size` bytes all-gathered or reduce-scattered over `ranks` GPUs, `stride` apart."""
        near = max(1, min(ranks, self.gpus_per_node // stride))
        nodes = math.ceil(ranks / near)
        outside = size * (nodes - 1) / nodes / near
        return self.seconds(size * (ranks - 1) / ranks - outside, outside, self.rates.collective)


def _compute(
    sizes: ModelSizes, flops: FlopCount, config: Any, seq_len: int, passes: int, rates: Rates
) -> float:
    """Seconds of one micro-batch. Ranks of a tp group share dense work unless it is replicated."""
    shared = config.sp_size * config.tp_size
    attention = config.sp_size * (1 if is_replicated(config) else config.tp_size)
    tokens = seq_len / config.sp_size
    split_tokens = config.enable_sequence_parallel or not is_replicated(config)
    dense = tokens / (config.tp_size if split_tokens else 1)
    seconds = passes * dense * (flops.linear + flops.router + flops.recurrence) / rates.dense
    seconds += passes * seq_len / shared * flops.experts / rates.experts
    attention_rate = rates.attention * seq_len / (seq_len + rates.attention_half)
    seconds += passes * seq_len / attention * flops.attention_causal(seq_len) / attention_rate
    seconds += 3 * tokens * flops.head / rates.head
    wide = tokens / (config.tp_size if config.enable_sequence_parallel else 1)
    return seconds + passes / 3 * wide * sizes.hidden * sizes.layers * rates.elementwise


def _experts_traffic(
    sizes: ModelSizes, config: Any, seq_len: int, passes: int, links: _Links, times: int
) -> float:
    """A row to each rank that has a choice of the token, and one back, in every pass."""
    if config.ep_size == 1:
        return 0.0
    tokens = seq_len / (config.sp_size * config.tp_size)
    per_peer = tokens * sizes.share_of_tokens(config.ep_size) * sizes.hidden * 2
    exchanges = 2 * (passes - 1) * len(sizes.sparse) * times  # backward sends what forward sent
    near = config.ep_size <= links.gpus_per_node
    rate = links.rates.nvlink if near else links.rates.collective
    return links.exchange(per_peer * exchanges, config.ep_size, rate)


def _sequence_traffic(
    sizes: ModelSizes, config: Any, seq_len: int, passes: int, links: _Links, times: int
) -> float:
    rate, layers = links.rates.collective, sizes.layers * (passes - 1) * times
    if config.sp_size > 1:  # q, k, v there and the output back, to every rank of the group
        tokens = seq_len / config.sp_size
        per_peer = tokens * sizes.attention_width * 2 / config.sp_size
        return links.exchange(per_peer * layers, config.sp_size, rate)
    if config.tp_size > 1 and not is_replicated(config):
        # two reductions a pass, each as much as an all-gather and a reduce-scatter
        size = seq_len * sizes.hidden * 2
        return links.ring(size * 4 * layers, config.tp_size, 1)
    return 0.0


def _fsdp_traffic(config: Any, held: Held, links: _Links, times: int) -> float:
    """Weights gathered in forward and backward of each micro-batch, gradients reduced once."""
    if config.dp_size == 1:
        return 0.0
    experts = sum(e for _, e in held.whole_by_layer)
    dense = held.whole - experts
    rounds = 2 * times + 1
    seconds = links.ring(dense * 2 * rounds, config.fsdp_size, config.tp_size)
    seconds += links.ring(experts * 2 * rounds, config.efsdp_size, config.ep_size)
    if config.dp_replicate_size > 1:
        inner = config.fsdp_size * config.tp_size
        seconds += links.ring(2 * held.local * 2, config.dp_replicate_size, inner)
    return seconds
