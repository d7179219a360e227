"""Models with random weights, made on the device: no checkpoint is read and none is gathered.

Weights are normal with a deviation of 0.02, embeddings with one of 1, and norms are ones. So a
token's own embedding outweighs what attention adds, which is nearly the same for all tokens of such
a model. Over 8 layers of Qwen3-30B-A3B the busiest expert gets 2.6 times a layer's mean.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_moe_ep import DistributedConfig


def random_model(
    config: PreTrainedConfig,
    layout: DistributedConfig | None,
    device: torch.device,
    seed: int,
    **options,
) -> PreTrainedModel:
    """The model of `config`, sharded as `layout` says, as from_pretrained would return it.

    `options` are from_pretrained's dtype, attn_implementation and experts_implementation. Ranks
    that hold the same weights have to give the same `seed`.
    """
    architecture = getattr(transformers, config.architectures[0])
    layout, _, mesh = architecture.prepare_distribute_model(layout)
    if layout is not None:
        config.distributed_config = layout
    with torch.device("meta"):
        model = architecture._from_config(config, **options)
    model = architecture.maybe_distribute_model(model, layout, mesh)
    model.to_empty(device=device)
    for name, rotary in list(model.named_modules()):
        if name.endswith("rotary_emb"):  # its buffers are no weights
            model.set_submodule(name, type(rotary)(config=config).to(device))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


def load_random(name: str, **init) -> PreTrainedModel:
    """In place of from_pretrained, for a folder that holds a config and no weights."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    layout = init.get("distributed_config")
    return random_model(
        AutoConfig.from_pretrained(name),
        layout,
        device,
        seed=rank if layout is None else rank // layout.tp_size,
        dtype=getattr(torch, init["dtype"]),
        attn_implementation=init["attn_implementation"],
        experts_implementation=init["experts_implementation"],
    )
