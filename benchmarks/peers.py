"""The implementations that are compared, each behind one signature: `forward(inputs) -> (T, H)`,
differentiable.

All compute SwiGLU experts with up weights (E, 2I, H), gate half first, and down weights (E, H, I),
some also gpt-oss's own layout and gate (problems.py). Adapters import what they wrap when they are
built, so that a missing package is a reason in the result and no failure.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable

import torch
from torch.nn.functional import silu

from .gate import Forward
from .problems import GPT_OSS_ALPHA, Inputs, Problem

OURS = "fastmoe"
LEAN = "fastmoe_lean"
BASELINE = "grouped_mm"  # the yardstick of the gate, and transformers' default


def _of_transformers(function: Callable[..., torch.Tensor], problem: Problem) -> Forward:
    """One of transformers' experts functions, over a module around the benchmark's own tensors that
    has what these functions read.
    """
    from transformers.integrations.moe import _default_apply_gate
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    apply_gate = GptOssExperts._apply_gate if problem.of_gpt_oss else _default_apply_gate

    def forward(i: Inputs) -> torch.Tensor:
        module = types.SimpleNamespace(
            num_experts=i.up.shape[0],
            gate_up_proj=i.up,
            down_proj=i.down,
            gate_up_proj_bias=i.up_bias,
            down_proj_bias=i.down_bias,
            act_fn=silu,
            alpha=GPT_OSS_ALPHA,
            limit=problem.limit,
            has_gate=True,
            has_bias=problem.bias,
            has_post_expert_norm=False,
            is_transposed=problem.transposed,
            is_concatenated=not problem.interleaved,
            _is_expert_parallel=False,
            config=types.SimpleNamespace(hidden_act="silu", _experts_implementation="eager"),
        )
        module._apply_gate = types.MethodType(apply_gate, module)
        return function(module, i.x, i.top_k_index, i.top_k_weights)

    return forward


def fastmoe(problem: Problem) -> Forward:
    """Ours, through the door that hf_moe_ep itself uses: $HF_MOE_EP_KERNEL picks bundled, hub or a
    path.
    """
    return _fused_experts(problem)


def _fused_experts(problem: Problem, **options) -> Forward:
    from hf_moe_ep.kernel import get_kernel

    kernel = get_kernel()
    options |= dict(gate=kernel.Gate(**problem.gate_options), is_transposed=problem.transposed)
    return lambda i: kernel.fused_experts(
        i.x, i.top_k_index, i.top_k_weights, i.up, i.down,
        up_bias=i.up_bias, down_bias=i.down_bias, **options,
    )  # fmt: skip


def fastmoe_lean(problem: Problem) -> Forward:
    """Ours, keeping the input alone between forward and backward."""
    return _fused_experts(problem, recompute=True)


def grouped_mm(problem: Problem) -> Forward:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return _of_transformers(grouped_mm_experts_forward, problem)


def batched_mm(problem: Problem) -> Forward:
    """What `generate()` uses. It copies the weights of every slot, so it is for decode only."""
    from transformers.integrations.moe import batched_mm_experts_forward

    return _of_transformers(batched_mm_experts_forward, problem)


def eager(problem: Problem) -> Forward:
    """The model's own loop over the experts that have tokens."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return _of_transformers(Qwen3MoeExperts.forward, problem)


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
OF_GPT_OSS = (OURS, LEAN, BASELINE, "batched_mm")  # those that compute its experts too


def check_names(names: list[str]) -> None:
    """Raises ValueError for a name that is no implementation's."""
    unknown = [n for n in names if n not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"unknown implementations {unknown}; choose from {list(IMPLEMENTATIONS)}")


def check_problem(problem: Problem) -> None:
    """Raises ValueError for a problem that has no yardstick."""
    if not (problem.plain or problem.of_gpt_oss):
        raise ValueError(
            f"{problem.name!r} cannot be compared: the others compute SwiGLU experts with the gate "
            "half first and no biases, some of them gpt-oss's; no sentinels, at least one token"
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
        if not problem.plain and name not in OF_GPT_OSS:
            missing[name] = "computes SwiGLU experts with the gate half first and no biases"
            continue
        try:
            found[name] = IMPLEMENTATIONS[name](problem)
        except ImportError as e:
            missing[name] = str(e)
    return found, missing
