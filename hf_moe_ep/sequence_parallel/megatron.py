"""Megatron-style sequence parallelism on the tp axis, as styles of a tp_plan: between its matrices
every rank holds its part of the tokens instead of a copy of all (arXiv:2205.05198).

Shapes: B batch, S tokens, padded inside to a multiple of N ranks, s = S / N tokens of this rank.
"""

from __future__ import annotations

from functools import cache

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import RowwiseParallel, TensorParallelLayer

from .padding import pad_inputs

EP_IMPLEMENTATION = "sequence_sharded"


def register() -> None:
    """Makes the styles and the EP implementation below known to transformers. Idempotent."""
    ALL_PARALLEL_STYLES.register("sp_decoder", Decoder())
    ALL_PARALLEL_STYLES.register("sp_layer", Layer())
    ALL_PARALLEL_STYLES.register("sp_attention", Attention())
    ALL_PARALLEL_STYLES.register("sp_attention_gathered", GatheredAttention())
    ALL_PARALLEL_STYLES.register("sp_attention_replicated", ReplicatedAttention())
    ALL_PARALLEL_STYLES.register("sp_rowwise", RowwiseParallel(output_layouts=Shard(1)))
    ALL_PARALLEL_STYLES.register(
        "sp_rowwise_split_input",
        RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    )
    EPImplementationInterface.register(EP_IMPLEMENTATION, sequence_sharded_ep)


def split(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(B, S, ...), the same on all ranks, to this rank's (B, s, ...); backward joins."""
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(1)]).to_local()


def join(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(B, s, ...) to (B, S, ...); backward takes this rank's part of a gradient all ranks share."""
    part = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
    whole = part.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Replicate()])


class Decoder(TensorParallelLayer):
    """The decoder, from token ids to the last norm: whole sequences in, whole sequences out."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        original_forward = module.forward

        def tp_forward(*args, **kwargs):
            kwargs, length = pad_inputs(args, kwargs, mesh.size(), "tp_size")
            outputs = original_forward(**kwargs)
            hidden = outputs["last_hidden_state"]
            outputs["last_hidden_state"] = join(hidden, mesh)[:, :length]
            if logits := outputs.get("router_logits"):
                rows = [join(r.unflatten(0, (hidden.shape[0], -1)), mesh) for r in logits]
                outputs["router_logits"] = tuple(r[:, :length].flatten(0, 1).clone() for r in rows)
            return outputs

        module.forward = tp_forward
        return module


class Layer(TensorParallelLayer):
    """A decoder layer. The first one takes this rank's tokens.

    Not the embedding: the decoder makes masks and positions from the length that comes out of it.
    """

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        index = next(m.layer_idx for m in module.modules() if hasattr(m, "layer_idx"))
        return (args if index else (split(args[0], mesh), *args[1:])), kwargs


class Attention(TensorParallelLayer):
    """Attention whose every projection of its input is column-wise, with an sp_rowwise output.

    One all-gather for all projections, and one reduce-scatter of their gradients.
    """

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True  # its own parameters, such as sinks: what the style "local_params" is for

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        hidden, put = _hidden_states(args, kwargs)
        part = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False)
        return put(part.redistribute(placements=[Replicate()]))


class GatheredAttention(Attention):
    """Attention that also does more with its input, whose gradient tp makes whole on every rank."""

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        hidden, put = _hidden_states(args, kwargs)
        return put(join(hidden, mesh))


class ReplicatedAttention(GatheredAttention):
    """Attention that tp does not split: every rank computes all of it and keeps its tokens."""

    def transform_output_post_forward(self, module, output, mesh):
        if isinstance(output, tuple):
            return split(output[0], mesh), *output[1:]
        return split(output, mesh)


def _hidden_states(args: tuple, kwargs: dict):
    """The hidden states, by keyword or first, and a function that puts others in their place."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], lambda x: (args, kwargs | {"hidden_states": x})
    return args[0], lambda x: ((x, *args[1:]), kwargs)


def sequence_sharded_ep(experts, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> EPImplementation:
    """`ep_implementation="sequence_sharded"`: "auto", told that no two ranks share a token.

    Other implementations hand each rank of a tp group its slice of tokens they share, and gather
    the slices back; here every rank comes with tokens of its own.
    """
    alone = _mesh_of_one(ep_mesh.device_type)
    return EPImplementationInterface()["auto"](experts, ep_mesh, alone)


@cache
def _mesh_of_one(device_type: str) -> DeviceMesh:
    """A tp mesh that holds this rank alone."""
    names = ("others", "this")
    return dist.init_device_mesh(device_type, (dist.get_world_size(), 1), mesh_dim_names=names)[
        "this"
    ]
