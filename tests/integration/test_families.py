"""`experts_implementation="fastmoe"` gives every family's own function: output and all gradients.

Whole tiny models in fp32 against transformers' eager loop, and the experts alone, on the tokens
they meet in their model, against fp64. A gate that is not known to the kernels runs as written.
"""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from hf_moe_ep.experts import gate_of  # and importing the package registers "fastmoe"
from tests import families
from tests.families import (
    forward_backward,
    relative_error,
    relative_errors,
    tiny_inputs,
    tiny_model,
)

FAMILIES = families.tested()
NAMES = [family.name for family in FAMILIES]


@pytest.fixture
def poisoned_memory():
    """torch.empty and its like hold NaN, so that reading what nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


# Gates that are not among the kernels': one computes in fp32, one has softcaps.
AS_WRITTEN = {"beam", "inkling2"}


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_which_gates_are_fused(family):
    for module in families.experts_modules(tiny_model(family)).values():
        assert (gate_of(module) is None) == (family.name in AS_WRITTEN)


def test_every_discovered_family_is_tested_or_skipped_with_a_reason():
    discovered = {family.name for family in families.discover()}
    assert len(discovered) == len(families.discover()) >= 65
    assert discovered == set(NAMES) | set(families.SKIPPED)
    assert all(reason.strip() for reason in families.SKIPPED.values())
    assert set(families.OVERRIDES) | set(families.MODEL_CLASSES) <= discovered


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_model_matches_eager(family, fastmoe_calls):
    eager, fast = tiny_model(family), tiny_model(family, "fastmoe")
    experts = families.experts_modules(fast)
    assert experts, "the tiny model has no module behind the experts interface"

    expected = forward_backward(eager)
    assert not fastmoe_calls
    actual = forward_backward(fast)
    assert set(fastmoe_calls) == set(experts.values())

    for name, error in relative_errors(actual, expected).items():
        assert error < 1e-5, name


def captured_calls(family):
    """(experts module, its inputs) for each call of experts in one forward of the tiny model."""
    model, captured = tiny_model(family), []
    for module in families.experts_modules(model).values():
        module.register_forward_pre_hook(
            lambda module, args: captured.append((module, [a.detach() for a in args]))
        )
    model(**tiny_inputs(model))
    return captured


def run_experts(forward, module, args, dtype, routing_dtype=None):
    """Output and gradients of x, routing weights and parameters, all in `dtype` but the routing."""
    module = copy.deepcopy(module).to(dtype)
    x, ids, weights = args
    x = x.to(dtype, copy=True).requires_grad_()
    weights = weights.to(routing_dtype or dtype, copy=True).requires_grad_()
    output = forward(module, x, ids, weights)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    probe = probe.bfloat16().to(output.dtype)  # the same values in every dtype
    (output * probe).sum().backward()
    results = {"output": output.detach(), "x": x.grad, "top_k_weights": weights.grad}
    return results | {n: p.grad for n, p in module.named_parameters()}


def rms_error(value, reference):
    """Of all elements together: steadier under a factor of two than the largest one."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()


# (experts, routing weights): about half of the routers give fp32 weights to a bf16 model's experts
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtype, routing_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_experts_are_as_exact_as_grouped_mm(family, dtype, routing_dtype):
    """Bound by the error of transformers' grouped_mm in the same dtypes, from the same values."""
    fastmoe = ALL_EXPERTS_FUNCTIONS["fastmoe"]
    eps = torch.finfo(dtype).eps
    for module, (x, ids, weights) in captured_calls(family):
        # rounded once, so that fp64 starts from what the dtypes can hold
        module, args = module.to(dtype), (x.to(dtype), ids, weights.to(routing_dtype))
        truth = run_experts(batched_mm_experts_forward, module, args, torch.float64)
        peer = run_experts(grouped_mm_experts_forward, module, args, dtype, routing_dtype)
        ours = run_experts(fastmoe, module, args, dtype, routing_dtype)
        for name, want in truth.items():
            yardstick = rms_error(peer[name], want)
            # 32 rather than a few: at its limit a clamp's gradient jumps, and rounding crosses it
            assert yardstick < 32 * eps, f"{name}: the yardstick itself is off"
            assert ours[name].dtype == peer[name].dtype, name
            assert rms_error(ours[name], want) < 2 * yardstick + eps, name


def shard(module, args):
    """The module and its inputs as rank 0 of two expert-parallel ranks has them, with sentinels."""
    x, ids, weights = args
    local = module.num_experts // 2
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim > 1:
            setattr(module, name, nn.Parameter(parameter.detach()[:local].clone()))
    module.num_experts, module._is_expert_parallel = local, True
    ids = ids.clamp(max=local)
    return x, ids, weights.masked_fill(ids == local, 0.0)


def assert_sentinels_are_inert(module, args):
    """Other ranks' rows: outputs and gradients exactly zero, and not a value of them is read."""
    x, ids, weights = shard(module, args)
    sentinel = ids == module.num_experts
    elsewhere = sentinel.all(dim=1)
    assert elsewhere.any() and not sentinel.all()
    truth = run_experts(batched_mm_experts_forward, module, (x, ids, weights), torch.float64)
    x = x.masked_fill(elsewhere[:, None], torch.nan)
    ours = run_experts(ALL_EXPERTS_FUNCTIONS["fastmoe"], module, (x, ids, weights), torch.float32)
    for name, want in truth.items():
        assert relative_error(ours[name], want) < 1e-5, name
    assert not ours["output"][elsewhere].any()
    assert not ours["x"][elsewhere].any()
    assert not ours["top_k_weights"][sentinel].any()


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_sentinels_are_inert(family, poisoned_memory):
    module, args = experts_and_inputs(family.name)
    assert_sentinels_are_inert(module, args)


def inputs_for(module, tokens=40):
    """(x, ids, weights) of that many tokens, each for two experts."""
    hidden = next(
        p.shape[1 if module.is_transposed else 2] for p in module.parameters() if p.ndim == 3
    )
    ids = torch.rand(tokens, module.num_experts).topk(2).indices
    return torch.randn(tokens, hidden), ids, torch.rand(tokens, 2)


def experts_and_inputs(name):
    """One experts module of that family, fp32, and 40 routed tokens for it."""
    module = next(iter(families.experts_modules(tiny_model(families.family(name))).values()))
    return module, inputs_for(module)


def assert_follows(module, args):
    """fastmoe gives the function that transformers' own batched_mm gives for this module."""
    expected = run_experts(batched_mm_experts_forward, module, args, torch.float32)
    actual = run_experts(ALL_EXPERTS_FUNCTIONS["fastmoe"], module, args, torch.float32)
    for name, want in expected.items():
        assert relative_error(actual[name], want) < 1e-5, name
    return actual["output"]


# One family each for: default gate, own gate, interleaved with bias, own act_fn, bias, transposed.
GATED = ["qwen3_moe", "deepseek_v4", "gpt_oss", "inkling2", "openai_privacy_filter", "aria"]


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("on", ["class", "instance"])
def test_an_altered_gate_runs_as_written(name, on):
    module, args = experts_and_inputs(name)
    before = assert_follows(module, args)

    def altered(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.sin(gate) + up * up.mean(dim=-1, keepdim=True)  # no known gate, mixes columns

    if on == "class":
        module.__class__ = type("Altered", (type(module),), {"_apply_gate": altered})
    else:
        module._apply_gate = types.MethodType(altered, module)
    assert relative_error(assert_follows(module, args), before) > 1e-2


def test_an_altered_gate_may_have_parameters(poisoned_memory):
    module, args = experts_and_inputs("qwen3_moe")
    module.temperature = nn.Parameter(torch.tensor(0.7))

    def tempered(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate / self.temperature) * up

    module.__class__ = type("Tempered", (type(module),), {"_apply_gate": tempered})
    assert_follows(module, args)  # among the gradients: temperature's
    assert_sentinels_are_inert(module, args)


def test_a_wrapped_gate_runs_as_written(monkeypatch):
    """functools.wraps gives a wrapper the name of the method that it replaces."""
    module, args = experts_and_inputs("gpt_oss")
    before, original = assert_follows(module, args), type(module)._apply_gate

    @functools.wraps(original)
    def doubled(self, gate_up):
        return 2 * original(self, gate_up)

    monkeypatch.setattr(type(module), "_apply_gate", doubled)
    assert relative_error(assert_follows(module, args), before) > 1e-2


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_an_act_fn_changed_in_place_is_the_one_that_runs(name, how):
    module, args = experts_and_inputs(name)
    before = assert_follows(module, args)
    if how == "hook":
        module.act_fn.register_forward_hook(lambda act, args, output: 3 * output)
    elif how == "pre-hook":
        module.act_fn.register_forward_pre_hook(lambda act, args: (args[0] - 1,))
    else:
        module.act_fn.forward = torch.tanh
    assert relative_error(assert_follows(module, args), before) > 1e-2


@pytest.mark.parametrize("name", ["gpt_oss", "openai_privacy_filter"])
def test_gate_constants_may_be_learned(name):
    module, args = experts_and_inputs(name)
    module.alpha = nn.Parameter(torch.tensor(1.3))
    assert_follows(module, args)  # among the gradients: alpha's


class SteepSiLU(nn.SiLU):
    """Passes `isinstance(act, nn.SiLU)`, and is another function."""

    def forward(self, x):
        return x * torch.sigmoid(2 * x)


class LearnedSlope(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


ACTIVATIONS = {
    "silu": nn.SiLU(),
    "functional silu": F.silu,
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(0.2),
    "tanh": nn.Tanh(),
    "function": lambda x: torch.cos(x) * x,
    "subclass of silu": SteepSiLU(),
    "with a parameter": LearnedSlope(),
}


@pytest.mark.parametrize("act_fn", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4", "nemotron_h", "gemma4"])
def test_a_changed_act_fn_is_the_one_that_runs(name, act_fn):
    module, args = experts_and_inputs(name)
    del module.act_fn  # a module slot takes no plain function
    module.act_fn = copy.deepcopy(act_fn)
    assert_follows(module, args)


@pytest.mark.parametrize("change", [{"limit": 0.2}, {"limit": 3.0}, {"alpha": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["gpt_oss", "openai_privacy_filter"])
def test_gate_constants_are_read_from_the_module(name, change):
    module, args = experts_and_inputs(name)
    before = assert_follows(module, args)
    for attribute, value in change.items():
        setattr(module, attribute, value)
    assert relative_error(assert_follows(module, args), before) > 1e-3
