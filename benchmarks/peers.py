"""The implementations that are compared, each behind one signature: `forward(inputs) -> (T, H)`,
differentiable.

All compute SwiGLU experts with up weights (E, 2I, H), gate half first, and down weights (E, H, I).
Adapters import what they wrap when they are built, so that a missing package is a reason in the
result and no failure.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable

import torch
from torch.nn.functional import silu

from .gate import Forward
from .problems import Inputs, Problem

OURS = "fastmoe"
LEAN = "fastmoe_lean"
BASELINE = "grouped_mm"  # the yardstick of the gate, and transformers' default


def _module(inputs: Inputs) -> types.SimpleNamespace:
    """What transformers' experts functions read from an experts module, around the benchmark's own
    tensors.
    """
    from transformers.integrations.moe import _default_apply_gate

    module = types.SimpleNamespace(
        num_experts=inputs.up.shape[0],
        gate_up_proj=inputs.up,
        down_proj=inputs.down,
        act_fn=silu,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
        config=types.SimpleNamespace(hidden_act="silu", _experts_implementation="eager"),
    )
    module._apply_gate = types.MethodType(_default_apply_gate, module)
    return module


def fastmoe(problem: Problem) -> Forward:
    """Ours, through the door that hf_moe_ep itself uses: $HF_MOE_EP_KERNEL picks bundled, hub or a
    path.
    """
    return _fused_experts()


def _fused_experts(**options) -> Forward:
    from hf_moe_ep.kernel import get_kernel

    kernel = get_kernel()
    gate = kernel.Gate("silu")
    return lambda i: kernel.fused_experts(
        i.x, i.top_k_index, i.top_k_weights, i.up, i.down, gate=gate, **options
    )


def fastmoe_lean(problem: Problem) -> Forward:
    """Ours, keeping the input alone between forward and backward."""
    return _fused_experts(recompute=True)


def grouped_mm(problem: Problem) -> Forward:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return lambda i: grouped_mm_experts_forward(_module(i), i.x, i.top_k_index, i.top_k_weights)


def batched_mm(problem: Problem) -> Forward:
    """What `generate()` uses. It copies the weights of every slot, so it is for decode only."""
    from transformers.integrations.moe import batched_mm_experts_forward

    return lambda i: batched_mm_experts_forward(_module(i), i.x, i.top_k_index, i.top_k_weights)


def eager(problem: Problem) -> Forward:
    """The model's own loop over the experts that have tokens."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return lambda i: Qwen3MoeExperts.forward(_module(i), i.x, i.top_k_index, i.top_k_weights)


def liger(problem: Problem) -> Forward:
    """Liger's fused MoE. Its autotuner, left on, takes minutes before the first step:
    $LIGER_FUSED_MOE_AUTOTUNE=1.
    """
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda i: LigerFusedMoEFunction.apply(
        i.x, i.up, i.down, i.top_k_index.int(), i.top_k_weights
    )


def scattermoe(problem: Problem) -> Forward:
    """ScatterMoE (arXiv 2403.08245), the hub's kernels-community/scattermoe, importable as
    `scattermoe`.
    """
    from scattermoe import flatten_sort_count, parallel_linear

    def forward(i: Inputs) -> torch.Tensor:
        sorted_ids, sorted_slots, offsets = flatten_sort_count(
            i.top_k_index, num_experts=i.up.shape[0]
        )
        order = (sorted_ids, sorted_slots, offsets)
        h = parallel_linear(i.x, i.up.transpose(1, 2), problem.K, *order, grouped_out=True)
        gate_half, up_half = h.chunk(2, -1)
        return parallel_linear(
            silu(gate_half) * up_half,
            i.down.transpose(1, 2),
            1,
            *order,
            grouped_in=True,
            gates=i.top_k_weights,
        )

    return forward


def sonicmoe(problem: Problem) -> Forward:
    """SonicMoE (arXiv 2512.14080), the hub's kernels-community/sonic-moe, importable as
    `sonic_moe`.

    Called as transformers 5.23 calls it (integrations/sonicmoe.py). It tunes for more than a minute
    on each new token count, so it takes part only when it is asked for.
    """
    from sonic_moe import moe_general_routing_inputs
    from sonic_moe.enums import ActivationType

    def forward(i: Inputs) -> torch.Tensor:
        tokens = torch.arange(problem.T, device=i.x.device, dtype=torch.int32)
        output, _ = moe_general_routing_inputs(
            i.x,
            i.top_k_weights.reshape(-1),
            tokens.repeat_interleave(problem.K),
            i.top_k_index.reshape(-1).int(),
            i.up.permute(1, 2, 0),
            None,
            i.down.permute(1, 2, 0),
            None,
            E=problem.E,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
            stream_id=None,
        )
        return output

    return forward


IMPLEMENTATIONS: dict[str, Callable[[Problem], Forward]] = {
    f.__name__: f
    for f in (fastmoe, fastmoe_lean, grouped_mm, batched_mm, eager, liger, scattermoe, sonicmoe)
}
NEEDS_CUDA = ("liger", "scattermoe", "sonicmoe")


def check_names(names: list[str]) -> None:
    """Raises ValueError for a name that is no implementation's."""
    unknown = [n for n in names if n not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"unknown implementations {unknown}; choose from {list(IMPLEMENTATIONS)}")


def check_problem(problem: Problem) -> None:
    """Raises ValueError for a problem that not every implementation computes."""
    plain = problem.gate == "silu" and problem.gated and problem.T and not problem.sentinels
    if not plain or problem.bias or problem.transposed or problem.interleaved:
        raise ValueError(
            f"{problem.name!r} cannot be compared: every implementation computes SwiGLU experts, "
            "with the gate half first, no biases, no sentinels and at least one token"
        )


def build(
    names: list[str], problem: Problem, device: torch.device
) -> tuple[dict[str, Forward], dict[str, str]]:
    """The implementations that can be had, and why each of the others cannot.

    Raises ValueError for an unknown name.
    """
    check_names(names)
    found: dict[str, Forward] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name in NEEDS_CUDA and device.type != "cuda":
            missing[name] = f"needs a CUDA GPU, and this runs on {device.type}"
            continue
        try:
            found[name] = IMPLEMENTATIONS[name](problem)
        except ImportError as e:
            missing[name] = str(e)
    return found, missing
