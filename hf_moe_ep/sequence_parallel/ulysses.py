"""`enable_sequence_parallel`: a loaded model whose ranks share every sequence, for tp_size = 1.

The ranks of a group are fed the same batch and each keeps its part of the tokens from the first
layer to the loss. From outside the model behaves like a data-parallel one that computed the whole
batch on each of these ranks: same loss, same per-token outputs, same averaged gradients.

Shapes: B batch, S tokens, padded inside to a multiple of N, s = S / N tokens of this rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .attention import PREFIX, STATE, Gather, register
from .padding import pad_inputs

IGNORE = -100  # label of a token that no loss counts


def enable_sequence_parallel(model: nn.Module, sp_size: int | None = None) -> nn.Module:
    """Shards every sequence that `model` sees over groups of `sp_size` consecutive ranks.

    Call it on all ranks, once, after loading and before training; a PEFT model is passed whole.
    `sp_size` defaults to the one in the model's DistributedConfig. Then feed the ranks of a group
    the same batch, of any length: `model(input_ids=..., labels=...).loss.backward()` gives what a
    data-parallel rank with that batch would have, to rounding, with parameters averaged over all
    ranks as FSDP2 does. `loss`, `aux_loss` and TRL's per-token outputs are the whole batch's;
    `logits` and hidden states stay this rank's part of the padded sequence.

    Returns `model`, changed in place: hooks, and its attention backend under "ulysses_<backend>".

    Raises:
        ValueError: ranks or heads that `sp_size` does not divide, tensor parallelism, a model that
            is no causal language model, or one that is sharded already.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(causal.config, "distributed_config", None)
    if sp_size is None:
        sp_size = getattr(config, "sp_size", None) or 1
    _check(causal, sp_size, getattr(config, "tp_size", None) or 1)
    if sp_size == 1:
        return model
    Sequence(_group(causal.device.type, sp_size)).attach(model, causal)
    causal.config._attn_implementation = register(causal.config._attn_implementation)
    return model


@cache
def _group(device_type: str, sp_size: int) -> dist.ProcessGroup:
    """This rank and the others of its `sp_size` consecutive ranks; the same for every model."""
    shape = (dist.get_world_size() // sp_size, sp_size)
    return dist.init_device_mesh(device_type, shape, mesh_dim_names=("dp", "sp")).get_group("sp")


def _check(causal: PreTrainedModel, sp_size: int, tp_size: int) -> None:
    name = type(causal).__name__
    if sp_size < 1:
        raise ValueError(f"sp_size={sp_size}: give 1 or more")
    if tp_size > 1 and sp_size > 1:
        raise ValueError(
            f"sp_size={sp_size} with tp_size={tp_size}: use tp_size=1, or shard the sequence over "
            "the tp axis with DistributedConfig(enable_sequence_parallel=True)"
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % sp_size:
        raise ValueError(f"sp_size={sp_size} does not divide the {world} ranks")
    if getattr(causal, "loss_type", None) != "ForCausalLM" or not hasattr(causal, "get_decoder"):
        raise ValueError(f"{name}: sp_size shards causal language models only")
    text = causal.config.get_text_config()
    if text.num_attention_heads % sp_size:
        raise ValueError(
            f"{name} has {text.num_attention_heads} attention heads, which sp_size={sp_size} does "
            "not divide"
        )
    for part, module in causal.get_decoder().named_modules():
        if part.endswith("indexer"):
            raise ValueError(
                f"{name}: {part} chooses among all tokens of a sequence; use sp_size=1"
            )
        if isinstance(module, nn.Conv1d):
            raise ValueError(f"{name}: {part} mixes tokens by a convolution; use sp_size=1")
    if causal.config._attn_implementation.startswith(PREFIX):
        raise ValueError(f"{name}: enable_sequence_parallel was called before")


class Sequence:
    """The hooks of one model, and what the parts of a forward tell each other."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.n, self.rank = group, group.size(), group.rank()
        self.columns = 0  # of the per-token outputs that the caller expects; 0 without labels
        self.length = 0  # S of the running batch, before padding
        self.attended = False  # whether the running layer has called Ulysses attention
        self.compared = False  # whether the ranks have compared their batches, once

    def attach(self, model: nn.Module, causal: PreTrainedModel) -> None:
        decoder = causal.get_decoder()
        model.register_forward_pre_hook(self.split_labels, with_kwargs=True)
        model.register_forward_hook(self.join_outputs)
        decoder.register_forward_pre_hook(self.pad_inputs, with_kwargs=True)
        decoder.register_forward_hook(self.join_router_logits)
        decoder.layers[0].register_forward_pre_hook(self.split_hidden_states)
        for layer in decoder.layers:
            layer.register_forward_pre_hook(self.split_positions, with_kwargs=True)
            layer.register_forward_hook(self.check_attended)
            for module in layer.modules():
                setattr(module, STATE, self)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.chunk(self.n, dim)[self.rank]

    def padded(self, x: Tensor, value: int = 0) -> Tensor:
        """(..., S) with its last dimension padded to the next multiple of N."""
        return pad(x, (0, -x.shape[-1] % self.n), value=value)

    # Around the model: the batch's labels in, the batch's loss and per-token outputs out.

    def split_labels(self, module: nn.Module, args: tuple, kwargs: dict):
        keep = kwargs.get("logits_to_keep")
        if torch.is_tensor(keep) or keep:
            raise ValueError(
                f"logits_to_keep={keep}: a model with sp_size={self.n} cannot generate, and a "
                "rank's logits are those of its tokens"
            )
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        self.columns = 0
        if labels is None and shifted is None:
            return args, kwargs
        self.columns = labels.shape[1] - 1 if shifted is None else shifted.shape[1]
        if shifted is None:
            shifted = pad(labels, (0, 1), value=IGNORE)[:, 1:]
        count = kwargs.get("num_items_in_batch")
        count = (shifted != IGNORE).sum() if count is None else count
        own = self.own(self.padded(shifted, IGNORE)).contiguous()
        # The cross-entropy is a sum over this rank's labels, divided by the count. join_outputs
        # then takes the mean over the ranks, so the count is divided by N; the auxiliary loss, of
        # the whole batch on every rank, keeps its weight.
        kwargs |= {"labels": own, "shift_labels": own, "num_items_in_batch": count / self.n}
        return args, kwargs

    def join_outputs(self, module: nn.Module, args: tuple, outputs: ModelOutput) -> ModelOutput:
        if not self.columns:
            return outputs
        if (loss := outputs.get("loss")) is not None:
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=self.group)
            outputs["loss"] = loss + (mean / self.n - loss.detach())
        for name, value in outputs.items():  # TRL: log_probs, entropy, label_mask, ... (B, s)
            if torch.is_tensor(value) and value.ndim == 2:
                outputs[name] = Gather.apply(value, 1, self.group)[:, : self.columns]
        return outputs

    # Around the decoder: whole, padded sequences in; router logits of whole sequences out.

    def pad_inputs(self, module: nn.Module, args: tuple, kwargs: dict):
        """Masks and positions stay the model's own work, on the whole sequence."""
        if not self.compared:
            self.compare_batches(kwargs.get("input_ids"))
        kwargs, self.length = pad_inputs(args, kwargs, self.n, "sp_size")
        return (), kwargs

    def compare_batches(self, ids: Tensor | None) -> None:
        """Once: later, a wait for the device in every step would cost more than it finds."""
        self.compared = True
        if ids is None:
            return
        mine = torch.stack([torch.full_like(ids[0, 0], ids.shape[1]), ids.sum()])
        all_ranks = Gather.apply(mine[None], 0, self.group)
        if (all_ranks != mine).any():
            raise ValueError(
                f"the {self.n} ranks that share their sequences were fed different batches; use "
                "hf_moe_ep.sequence_parallel.share_batches(args, sp_size) before making a trainer, "
                f"or give ranks r to r + {self.n - 1} the same batch in a loop of your own"
            )

    def join_router_logits(self, module: nn.Module, args: tuple, outputs: ModelOutput):
        """So that the auxiliary losses are the model's own, of whole sequences without padding."""
        logits = outputs.get("router_logits")
        if not logits:
            return outputs
        batch = outputs["last_hidden_state"].shape[0]
        outputs["router_logits"] = tuple(self.join_rows(rows, batch) for rows in logits)
        return outputs

    def join_rows(self, rows: Tensor, batch: int) -> Tensor:
        """(B * s, experts) to (B * S, experts)."""
        whole = Gather.apply(rows.unflatten(0, (batch, -1)), 1, self.group)[:, : self.length]
        return whole.flatten(0, 1).clone()  # FSDP2 warns of a model that returns views

    # Around the layers: the first splits the tokens, each takes its tokens' rotary embedding.

    def split_hidden_states(self, module: nn.Module, args: tuple):
        # A copy: a view would keep the embeddings of the whole sequence until backward.
        return self.own(args[0]).clone(), *args[1:]

    def split_positions(self, module: nn.Module, args: tuple, kwargs: dict):
        self.attended = False
        for name, value in kwargs.items():
            if name.startswith("position_embeddings") and value is not None:
                kwargs[name] = self.own_positions(value)
        return args, kwargs

    def own_positions(self, value: Tensor | tuple) -> Tensor | tuple:
        """(B, S, d) or (S, d), or a tuple (cos, sin) of such, to this rank's tokens."""
        if isinstance(value, tuple):
            return tuple(self.own_positions(v) for v in value)
        if not torch.is_tensor(value):
            raise ValueError(f"position embeddings as {type(value).__name__}: use sp_size=1")
        return self.own(value, value.ndim - 2)

    def check_attended(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        if not self.attended:
            raise ValueError(
                f"{type(module).__name__} mixes tokens without transformers' attention interface "
                "(a recurrent, convolution or linear-attention layer), which sp_size cannot shard"
            )
