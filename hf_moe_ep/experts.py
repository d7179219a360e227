"""The experts forward that transformers calls: hands a Hugging Face experts module to fastmoe.

Shapes: hidden_states (T, H), top_k_index and top_k_weights (T, K); the module's weights are stacks
over E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import activations
from transformers.integrations.moe import _default_apply_gate

from .kernel import get_kernel

fastmoe = get_kernel()

# Names of `experts_implementation` that run fastmoe.
NAMES = ("fastmoe", "fastmoe_lean")

# Activation modules whose formula is one that the kernels fuse, by exact type: a subclass may
# compute something else.
_ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}
# The gates without constants, made once: a layer of few tokens would wait for making its own.
_GATED, _UNGATED = (
    {name: fastmoe.Gate(name, gated=gated) for name in set(_ACTIVATIONS.values())}
    for gated in (True, False)
)


def _clamped(module: nn.Module, limit: str, alpha: str | None = None, **options) -> dict | None:
    """A Gate's options; None where a constant is a tensor, which may be learned."""
    limit, alpha = getattr(module, limit), getattr(module, alpha) if alpha else 1.0
    if isinstance(limit, torch.Tensor) or isinstance(alpha, torch.Tensor):
        return None
    return dict(limit=math.inf if limit is None else float(limit), alpha=float(alpha), **options)


# `_apply_gate` methods of transformers whose formula is a Gate, by qualified name. Any other runs
# as written.
_GATES = {
    "gpt_oss.modeling_gpt_oss.GptOssExperts": lambda m: _clamped(
        m, "limit", activation="silu", interleaved=True, alpha="alpha", up_offset=1.0
    ),
    "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": lambda m: (
        _clamped(m, "limit", activation="silu", alpha="alpha", up_offset=1.0)
    ),
    "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": lambda m: _clamped(
        m, "swiglu_limit", activation="silu", alpha="swiglu_alpha", up_offset=1.0
    ),
    "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts": lambda m: _clamped(
        m, "limit", activation=_activation_of(m)
    ),
    "hy_v4.modeling_hy_v4.HYV4Experts": lambda m: _clamped(m, "swiglu_limit", activation="silu"),
    "glm5_next.modeling_glm5_next.Glm5NextTextExperts": lambda m: _clamped(
        m, "swiglu_limit", activation="silu"
    ),
}


def fastmoe_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    routing: fastmoe.Routing | Callable | None = None,
    recompute: bool = False,
    place: Callable | None = None,
) -> torch.Tensor:
    """(T, H): the weighted sum of each token's experts.

    Serves any experts module behind transformers' interface; `routing`, `recompute` and `place`
    as in `fused_experts`. Reads the flags that `use_experts_implementation` sets (has_gate,
    has_bias, is_transposed, has_post_expert_norm) and the module's own gate. Raises ValueError for
    weights that fastmoe cannot run, quantised ones above all.
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"
    bias = self.has_bias
    return fastmoe.fused_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(self, name),
        self.down_proj,
        gate=gate_of(self) or (self._apply_gate if self.has_gate else self.act_fn),
        up_bias=getattr(self, name + "_bias") if bias else None,
        down_bias=self.down_proj_bias if bias else None,
        is_transposed=self.is_transposed,
        post_norm=self.post_expert_norm if self.has_post_expert_norm else None,
        routing=routing,
        recompute=recompute,
        place=place,
    )


def lean_experts_forward(self: nn.Module, *args, **kwargs) -> torch.Tensor:
    """`fastmoe_experts_forward` that keeps its input alone for backward. The same bits."""
    return fastmoe_experts_forward(self, *args, recompute=True, **kwargs)


def gate_of(module: nn.Module):
    """The fused `Gate` that equals the module's own gate or activation.

    None where the module's code must run.
    """
    activation = _activation_of(module)
    if not module.has_gate:
        return _UNGATED.get(activation)
    if "_apply_gate" in vars(module):  # put on this module alone
        return None
    # The class's function, not the bound method's __func__, which torch.compile reads as None.
    function = type(module)._apply_gate
    if function is _default_apply_gate:
        return _GATED.get(activation)
    # A method of the module's own: known only under the very name it has in transformers, which its
    # code object has too: functools.wraps gives any wrapper the __module__ and __qualname__.
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    name = f"{function.__globals__['__name__']}.{code.co_qualname}"
    options = _GATES.get(name.removeprefix("transformers.models.").removesuffix("._apply_gate"))
    options = options(module) if options else None
    return fastmoe.Gate(**options) if options and options["activation"] else None


def _activation_of(module: nn.Module) -> str | None:
    """The fused activation that `act_fn` is; None where it is another or was changed in place."""
    act = getattr(module, "act_fn", None)
    if act is nn.functional.silu:
        return "silu"
    name = _ACTIVATIONS.get(type(act))
    changed = name and ("forward" in vars(act) or act._forward_hooks or act._forward_pre_hooks)
    return None if changed else name


def unsupported_fp8_experts_forward(self: nn.Module, *args, **kwargs) -> torch.Tensor:
    """What "fastmoe" means for an FP8 checkpoint: always a ValueError that names the way out."""
    raise ValueError(
        'experts_implementation="fastmoe" does not run FP8 checkpoints yet; load the model with '
        'experts_implementation="grouped_mm", or load it dequantised'
    )
