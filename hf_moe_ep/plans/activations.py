"""Bytes that a model's forward keeps for its backward, found by running it without data.

Attention and experts are stand-ins that keep what a flash attention kernel and fastmoe keep; all
else is the model's own code. T tokens, H hidden, S = T * top_k, I intermediate.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .model import experts_modules

STAND_IN = "hf_moe_ep_stand_in"


@dataclass(frozen=True)
class Saved:
    """Bytes kept between forward and backward by one decoder layer, for one micro-batch."""

    hidden: int  # tensors of width H: inputs of norms and projections, residual stream
    inner: int  # all other tensors: heads, intermediate activations, router
    experts: int  # inside the experts: up projections (S, 2I), routing

    @property
    def total(self) -> int:
        return self.hidden + self.inner + self.experts


def saved_bytes(model: PreTrainedModel, tokens: int) -> tuple[list[Saved], int]:
    """What each decoder layer keeps for one sequence of `tokens`, and what stands around them.

    `model` is on the meta device, in the dtype it computes in; it is left as it was. A tensor that
    several operations keep counts once, for the first.

    Raises:
        ValueError: a model whose forward cannot run on the meta device.
    """
    decoder = model.get_decoder()
    config = decoder.config
    before = config._attn_implementation, config._experts_implementation
    config._attn_implementation = config._experts_implementation = STAND_IN
    for module in experts_modules(decoder).values():
        module.config._experts_implementation = STAND_IN
    try:
        by_module = _run(decoder, tokens)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be planned: its forward fails without data: {error}"
        ) from None
    finally:
        config._attn_implementation, config._experts_implementation = before
        for module in experts_modules(decoder).values():
            module.config._experts_implementation = before[1]
    layers = [defaultdict(int) for _ in decoder.layers]
    around = 0
    for name, tensors in by_module.items():
        path = name.split(".")
        for shape, size in tensors:
            if path[0] != "layers" or len(path) < 2:
                around += size
            elif "experts" in path:
                layers[int(path[1])]["experts"] += size
            else:
                wide = shape[-1:] == (config.hidden_size,)
                layers[int(path[1])]["hidden" if wide else "inner"] += size
    return [Saved(kept["hidden"], kept["inner"], kept["experts"]) for kept in layers], around


def _run(decoder: nn.Module, tokens: int) -> dict[str, list[tuple[tuple[int, ...], int]]]:
    """Module name -> (shape, bytes) of every tensor that its own operations keep."""
    running, kept, alive, handles = [""], defaultdict(list), {}, []
    # Models ask this mode whether values may be read, and take the way that needs none.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for parameter in decoder.parameters():
        for tensor in (parameter, mode.from_tensor(parameter)):
            alive[tensor.untyped_storage()._cdata] = tensor
    for name, module in decoder.named_modules():
        enter = module.register_forward_pre_hook(lambda m, args, name=name: running.append(name))
        leave = module.register_forward_hook(lambda m, args, output: running.pop() and None)
        handles += [enter, leave]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in alive:
            alive[storage._cdata] = storage  # held, so that no other storage gets its address
            kept[running[-1]].append((tuple(x.shape), storage.nbytes()))
        return x

    training = decoder.training
    try:
        with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            decoder.train()(input_ids=ids, use_cache=False)
    finally:
        decoder.train(training)
        for handle in handles:
            handle.remove()
    return kept


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and the log-sum-exp of each query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])  # (B, T, heads, d)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


class _Experts(torch.autograd.Function):
    """Keeps the input (T, H), ids and weights (T, K), and the up projections (S, width)."""

    @staticmethod
    def forward(ctx, x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(x, ids, weights, x.new_empty(ids.numel(), width))
        return torch.empty_like(x)


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _Attention.apply(query, key, value), None


def _experts(module, hidden_states, top_k_index, top_k_weights):
    up = module.gate_up_proj if module.has_gate else module.up_proj
    width = up.shape[-1 if module.is_transposed else -2]
    return _Experts.apply(hidden_states, top_k_index, top_k_weights, up, width)


AttentionInterface.register(STAND_IN, _attention)
AttentionMaskInterface.register(STAND_IN, lambda *args, **kwargs: None)
ALL_EXPERTS_FUNCTIONS.register(STAND_IN, _experts)
