"""The kernels-hub layer: fastmoe's forward for an experts module that keeps its own weights.

Stateless, as hub layers must be: `kernelize` puts this forward on the module, whose attributes it
reads. Shapes: hidden_states (T, H), top_k_index and top_k_weights (T, K).
"""

from __future__ import annotations

import torch
from torch import nn

from .gates import Gate
from .moe import fused_experts

_SILU = {"torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation"}


class Experts(nn.Module):
    """Experts with stacked weights, laid out as transformers does (integrations/moe.py).

    Reads gate_up_proj (E, 2I, H) and down_proj (E, H, I) and, where the module has them:
    gate_up_proj_bias, down_proj_bias, is_transposed, up_proj instead of gate_up_proj (has_gate
    False), post_expert_norm (has_post_expert_norm) and _apply_gate. SwiGLU is fused; every other
    gate runs as the module wrote it.
    """

    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """(T, H): each token's weighted sum. Raises ValueError as `fused_experts` does."""
        name = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
        return fused_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            getattr(self, name),
            self.down_proj,
            gate=_gate_of(self),
            up_bias=getattr(self, name + "_bias", None),
            down_bias=getattr(self, "down_proj_bias", None),
            is_transposed=getattr(self, "is_transposed", False),
            post_norm=self.post_expert_norm
            if getattr(self, "has_post_expert_norm", False)
            else None,
        )


def _gate_of(module: nn.Module):
    """A `Gate` where the module's formula is SwiGLU without doubt, else the module's own code."""
    if not getattr(module, "has_gate", True):
        return module.act_fn
    own, act = getattr(module, "_apply_gate", None), module.act_fn
    # transformers gives this method to every experts class that does not write one. Its code
    # object has the name whatever wraps it; functools.wraps gives a wrapper the __name__ too. Read
    # from the class: torch.compile takes a bound method's __func__ for None.
    code = getattr(getattr(type(module), "_apply_gate", None), "__code__", None)
    default = code is not None and code.co_name == "_default_apply_gate"
    if own is not None and ("_apply_gate" in vars(module) or not default):
        return own
    known = f"{type(act).__module__}.{type(act).__qualname__}" in _SILU
    if known and not ("forward" in vars(act) or act._forward_hooks or act._forward_pre_hooks):
        return Gate("silu")
    return own or _Glu(act)


class _Glu:
    """act(gate) * up of (S, 2I), the two halves concatenated."""

    def __init__(self, activation):
        self.activation = activation

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.activation(gate) * up
