"""Ulysses attention: every rank of a group attends over the whole sequence, for its share of heads.

Registered with transformers as "ulysses_<backend>" for any attention backend it knows; one
all-to-all before the backend turns tokens into heads, one after it turns them back.

Shapes: B batch, s tokens of this rank, S = s * N tokens, h query heads, g key/value heads, d head
size, N ranks of the group.
"""

from __future__ import annotations

import sys
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .saved_output import exchange_output

PREFIX = "ulysses_"
STATE = "ulysses_sequence"  # attribute of the attention modules: the Sequence they attend over


def register(backend: str) -> str:
    """Makes `backend` usable over a sharded sequence; returns the name it is registered under.

    `backend`: "eager", or a name in transformers' AttentionInterface: sdpa, flash_attention_2, ...
    or a kernel of the hub that is loaded. Idempotent.

    Raises:
        ValueError: transformers does not know `backend`.
    """
    if backend.startswith(PREFIX):
        return backend
    if backend != "eager" and backend not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attn_implementation={backend!r} is not registered with transformers; choose one of "
            f"eager, {', '.join(ALL_ATTENTION_FUNCTIONS.valid_keys())}"
        )
    name = PREFIX + backend.replace(
        "/", "_"
    )  # with a "/" transformers would look for it on the hub
    AttentionInterface.register(name, partial(ulysses_attention_forward, backend=backend))
    if backend in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    return name


def ulysses_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    backend: str,
    **kwargs,
) -> tuple[Tensor, None]:
    """DeepSpeed-Ulysses (arXiv:2309.14509) around `backend`; transformers' attention signature.

    query (B, h, s, d), key (B, g, s, d), value (B, g, s, dv): this rank's tokens, rotary embedding
    applied. `attention_mask` and everything in `kwargs` (position_ids, cu_seq_lens_q, ...) describe
    the whole sequence of S tokens, as the backend wants them. Where g is not a multiple of N, key
    and value heads are repeated until it is. Returns ((B, s, h, dv), None).

    Raises:
        ValueError: h is not a multiple of N, a bias per head, or a module that
            `enable_sequence_parallel` has not seen.
    """
    sequence = getattr(module, STATE, None)
    if sequence is None:
        raise ValueError(
            f"{type(module).__name__} runs {PREFIX}{backend} on a whole sequence; call "
            "hf_moe_ep.sequence_parallel.enable_sequence_parallel(model) after loading"
        )
    group, n, rank = sequence.group, sequence.n, sequence.rank
    sequence.attended = True
    if query.shape[1] % n:
        raise ValueError(f"{query.shape[1]} attention heads do not divide by sp_size={n}")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__}: position_bias is not supported with sp_size")
    repeats = n // gcd(n, key.shape[1])
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    query, key, value = tokens_to_heads([query, key, value], group)

    own: dict[str, Any] = {"num_key_value_groups": query.shape[1] // key.shape[1]}
    own["config"] = _View(module.config, _attn_implementation=backend)
    if (sinks := getattr(module, "sinks", None)) is not None:  # gpt-oss: one number per head
        own["sinks"] = sinks.chunk(n)[rank]
    if kwargs.get("s_aux") is not None:
        kwargs["s_aux"] = kwargs["s_aux"].chunk(n)[rank]
    view = _View(module, **own)
    attend = _backend(module, backend)
    output = exchange_output(
        lambda: attend(view, query, key, value, attention_mask, **kwargs)[0],
        partial(heads_to_tokens, group=group),
        partial(output_to_heads, group=group),
    )
    return output, None


def _backend(module: nn.Module, backend: str):
    if backend == "eager":  # every modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]


class _View:
    """Reads like `target`, but for the attributes given: what depends on the share of heads."""

    def __init__(self, target: Any, **own: Any):
        self.__dict__.update(own, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def tokens_to_heads(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each (B, heads, s, d) to (B, heads / N, S, d), in one all-to-all; d may differ.

    Two ranks, heads 0 and 1, tokens a b | c d: rank 0 gets head 0 of a b c d, rank 1 gets head 1.
    """
    n = dist.get_world_size(group)
    # (B, heads, s, d) -> (N, B, s, heads / N * d): what goes to one rank is contiguous
    parts = [t.unflatten(1, (n, -1)).permute(1, 0, 3, 2, 4).flatten(3) for t in tensors]
    received = AllToAll.apply(torch.cat(parts, dim=-1), group)  # (N, B, s, sum of heads / N * d)
    whole = received.transpose(0, 1).flatten(1, 2)  # (B, S, ...): no copy for B = 1
    shares = whole.split([p.shape[-1] for p in parts], dim=-1)
    return [
        share.unflatten(-1, (-1, t.shape[-1])).transpose(1, 2)
        for share, t in zip(shares, tensors, strict=True)
    ]


def heads_to_tokens(output: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S, heads / N, d) to (B, s, heads, d): the way back, in one all-to-all."""
    n = dist.get_world_size(group)
    parts = output.unflatten(1, (n, -1)).transpose(0, 1)  # (N, B, s, heads / N, d)
    received = AllToAll.apply(parts, group)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


def output_to_heads(output: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, s, heads, d) to (B, S, heads / N, d), contiguous: the inverse of `heads_to_tokens`."""
    n = dist.get_world_size(group)
    parts = output.unflatten(2, (n, -1)).permute(2, 0, 1, 3, 4)  # (N, B, s, heads / N, d)
    return AllToAll.apply(parts, group).transpose(0, 1).flatten(1, 2).contiguous()


class AllToAll(torch.autograd.Function):
    """(N, ...): row i goes to rank i of the group, and row i of the result came from it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, ctx.group), None


class Gather(torch.autograd.Function):
    """The ranks' tensors joined along `dim`; backward sums what all ranks ask of this rank's part.

    Every rank goes on with the same joined tensor to the same loss, so a gradient comes back N
    times as large: as if N data-parallel ranks had computed the whole sequence each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
        ]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None
