"""What people do with a model, done with fastmoe: generate, switch, save, compile, train, misuse.

Tiny Qwen3-MoE and gpt-oss models on CPU, against transformers' own implementations.
"""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_moe_ep  # noqa: F401  (registers "fastmoe")
from hf_moe_ep.experts import fastmoe
from tests.families import (
    experts_modules,
    family,
    forward_backward,
    relative_error,
    tiny_inputs,
    tiny_model,
)

MODELS = ["qwen3_moe", "gpt_oss"]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
GREEDY = {"max_new_tokens": 10, "do_sample": False}


def model_of(name, implementation="fastmoe", **options):
    return tiny_model(family(name), implementation, **options)


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic cache", "static cache"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_eager(name, cache, fastmoe_calls):
    prompt = torch.tensor([PROMPTS[0], PROMPTS[2][:4]])
    options = GREEDY | ({"cache_implementation": cache} if cache else {})
    expected = model_of(name, "eager").generate(prompt, **GREEDY)
    assert not fastmoe_calls
    model = model_of(name)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert len(fastmoe_calls) == 10 * len(experts_modules(model))  # prefill and nine more tokens


@pytest.mark.parametrize("name", MODELS)
def test_continuous_batching_equals_generate(name, fastmoe_calls):
    expected = [
        model_of(name, "eager")
        .generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
        .tolist()
        for prompt in PROMPTS
    ]
    batching = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    outputs = model_of(name).generate_batch(
        PROMPTS, continuous_batching_config=batching, max_new_tokens=10
    )
    assert [outputs[f"req_{i}"].generated_tokens for i in range(len(PROMPTS))] == expected
    assert fastmoe_calls


def test_switching_back_and_forth_gives_the_same_bits(fastmoe_calls):
    model = model_of("qwen3_moe")
    layers = len(experts_modules(model))
    before = logits(model)
    assert len(fastmoe_calls) == layers
    model.set_experts_implementation("eager")
    eager = logits(model)
    assert len(fastmoe_calls) == layers
    model.set_experts_implementation("fastmoe")
    assert torch.equal(logits(model), before)
    assert len(fastmoe_calls) == 2 * layers
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), eager)
    assert relative_error(before, eager) < 1e-5


# The default gate; interleaved with biases; a norm after each expert, which runs as written.
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "muse_spark"])
def test_lean_experts_give_the_same_bits(name):
    model = model_of(name).train()
    expected = forward_backward(model)
    model.zero_grad()
    model.set_experts_implementation("fastmoe_lean")
    assert all(m.config._experts_implementation == "fastmoe_lean" for m in experts_of(model))
    for key, want in forward_backward(model).items():
        assert torch.equal(expected[key], want), key


def experts_of(model):
    return experts_modules(model).values()


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    assert "fastmoe" not in (tmp_path / "config.json").read_text()  # a checkpoint needs no plug-in
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fastmoe")
    assert loaded.config._experts_implementation == "fastmoe"
    assert torch.equal(logits(loaded), logits(model))
    default = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert default.config._experts_implementation == "grouped_mm"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name


# The default gate; interleaved with biases; a gate that runs as written; a norm after each expert.
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "inkling2", "muse_spark"])
def test_moe_block_compiles_without_a_graph_break(name):
    model = model_of(name)
    block = model.get_submodule(next(iter(experts_modules(model))).rpartition(".")[0])
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    for tokens in (12, 7):  # the second makes the number of tokens dynamic
        x = torch.randn(2, tokens, model.config.get_text_config().hidden_size)
        for want, got in zip(run_block(block, x), run_block(compiled, x), strict=True):
            assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_compiled_block_keeps_the_fused_gate(name, monkeypatch):
    def unfused(*args):
        raise AssertionError("the gate runs as written")

    monkeypatch.setattr(fastmoe.moe, "_as_written", unfused)
    model = model_of(name)
    block = model.get_submodule(next(iter(experts_modules(model))).rpartition(".")[0])
    x = torch.randn(2, 12, model.config.get_text_config().hidden_size)
    want = run_block(block, x)
    got = run_block(torch.compile(block, backend="aot_eager", fullgraph=True), x)
    for w, g in zip(want, got, strict=True):
        assert relative_error(g, w) < 1e-6


def run_block(block, x):
    """The output and the gradients of the input and of every parameter."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    output = block(x)
    output = output[0] if isinstance(output, tuple) else output
    output.square().sum().backward()
    return [output.detach(), x.grad] + [p.grad for p in block.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant, fastmoe_calls):
    expected = forward_backward(model_of(name))
    fastmoe_calls.clear()
    model = model_of(name).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = forward_backward(model)
    assert len(fastmoe_calls) == 2 * len(experts_modules(model))  # once more each in backward
    for key, want in expected.items():
        assert torch.equal(actual[key], want), key


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x fp32", "x bf16"])
def test_autocast_computes_in_the_dtype_of_the_weights(weights, x_dtype):
    """As grouped_mm: the activations are cast to the weights' dtype, the output back to x's."""
    module = next(iter(experts_modules(model_of("qwen3_moe")).values())).to(weights)
    ids = torch.rand(40, module.num_experts).topk(2).indices
    x, routing, probe = torch.randn(40, 32).to(x_dtype), torch.rand(40, 2), torch.randn(40, 32)
    results = {}
    for name in ("grouped_mm", "fastmoe"):
        experts = copy.deepcopy(module)
        x_leaf, routing_leaf = x.clone().requires_grad_(), routing.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = ALL_EXPERTS_FUNCTIONS[name](experts, x_leaf, ids, routing_leaf)
        (output * probe.to(output.dtype)).sum().backward()
        results[name] = {"output": output.detach(), "x": x_leaf.grad, "routing": routing_leaf.grad}
        results[name] |= {n: p.grad for n, p in experts.named_parameters()}
    for key, want in results["grouped_mm"].items():
        got = results["fastmoe"][key]
        assert got.dtype == want.dtype, key
        # fp32 weights: nothing but x and the output may be in bf16. Else a few roundings to 8 bits.
        exact = weights == torch.float32 and want.dtype == torch.float32
        assert relative_error(got, want) < (1e-5 if exact else 3e-2), key


def test_autocast_model_matches_grouped_mm():
    outputs = {}
    for name in ("grouped_mm", "fastmoe"):
        model = model_of("qwen3_moe", name)
        with torch.autocast("cpu", torch.bfloat16):
            outputs[name] = forward_backward(model)
    for key, want in outputs["grouped_mm"].items():
        assert outputs["fastmoe"][key].dtype == want.dtype, key
        assert relative_error(outputs["fastmoe"][key], want) < 5e-2, key


def test_fp8_checkpoints_are_refused_by_name():
    quantisation = FineGrainedFP8Config(weight_block_size=(8, 8))
    model = replace_with_fp8_linear(model_of("qwen3_moe"), quantization_config=quantisation)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, FP8Experts)
    with pytest.raises(ValueError, match="does not run FP8 checkpoints"):
        experts(torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
def test_quantised_weights_are_refused(dtype, which):
    model = model_of("qwen3_moe")
    for module in experts_modules(model).values():
        quantised = getattr(module, which).detach().to(dtype)
        setattr(module, which, nn.Parameter(quantised, requires_grad=False))
    with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
        model(**tiny_inputs(model))


def call(x=(7, 32), ids=None, weights=(7, 2)):
    return {
        "hidden_states": torch.randn(x),
        "top_k_index": torch.zeros(7, 2, dtype=torch.long) if ids is None else ids,
        "top_k_weights": torch.ones(weights),
    }


WRONG = {
    "x too narrow": (call(x=(7, 31)), "31"),
    "x with a batch": (call(x=(1, 7, 32)), "1, 7, 32"),
    "ids of floats": (call(ids=torch.zeros(7, 2)), "float32"),
    "ids for other tokens": (call(ids=torch.zeros(6, 2, dtype=torch.long)), "6"),
    "ids in one row": (call(ids=torch.zeros(14, dtype=torch.long)), "14"),
    "weights of another shape": (call(weights=(7, 3)), "7, 3"),
}


@pytest.mark.parametrize("arguments, value", WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_named(arguments, value):
    module = next(iter(experts_modules(model_of("qwen3_moe")).values()))
    with pytest.raises(ValueError, match=value):
        module(*arguments.values())
