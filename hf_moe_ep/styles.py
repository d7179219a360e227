"""Parallel styles that replace transformers' own under the same name.

A style is chosen by name in a model's `tp_plan`; `registry.py` registers these in its place.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce


class AccumulationSafeGradAllReduce(ReplicatedWithGradAllReduce):
    """A replicated parameter whose gradient is a part on every rank of the mesh, as a q_norm's is.

    The class it replaces (transformers 5.23, `distributed/tensor_parallel.py`) sums the accumulated
    `.grad` over the ranks after every backward, so with gradient accumulation the earlier
    micro-batches are summed again and again. Here each backward's own gradient is summed, before it
    is accumulated, so every micro-batch counts once.
    """

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Replaces `module.forward` by one that also hooks the module's own parameters.

        The hooks go on in the first forward, as the class it replaces does: the parameters here are
        placeholders that loading, and FSDP2 later, replace.
        """
        original_forward = module.forward
        group = mesh.get_group()
        hooked: dict[str, nn.Parameter] = {}

        def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=group)
            return gradient

        def tp_forward(*args, **kwargs):
            if torch.is_grad_enabled():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad and hooked.get(name) is not parameter:
                        parameter.register_hook(sum_over_ranks)
                        hooked[name] = parameter
            return original_forward(*args, **kwargs)

        module.forward = tp_forward
        return module
