"""The FLOP count against torch's own counter on tiny models of every family, and by hand.

Eager experts and eager attention, so that the counter sees every multiplication: 2 x 12 tokens.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_moe_ep.training import AttentionTerm, count_flops
from hf_moe_ep.training.flops import attention_of, decoder_matmuls, recurrence, text_path
from tests import families

TOKENS, L = 24, 12  # two rows of 12 tokens

# Config changes by family: what eager attention needs to run at all (it repeats keys, and these
# models already have one per head), and layer types that a two-layer model leaves out.
CONFIG = {
    name: {"num_key_value_heads": 4}
    for name in (
        "axk1",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe_lite",
        "mistral4",
        "unlimited_ocr",
    )
} | {
    "glm5_next": {"layer_types": ["linear_attention", "indexed_attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "minimax_m3_vl": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
    },
}

# FLOPs per token that torch sees and the count leaves out, each exactly as large as stated here.
NOT_COUNTED = {
    # residual streams mixed by a 4 x 4 matrix per token, after attention and MLP of two layers
    "deepseek_v4": 2 * 2 * 2 * 4 * 4 * 32,
    "glm5_next": 2 * 2 * 2 * 4 * 4 * 32,
    # relative position logits: 4 heads x (4 -> 8) in two layers
    "inkling": 2 * 2 * 4 * 4 * 8,
    "inkling2": 2 * 2 * 4 * 4 * 8,
    # one value projection (32 -> 16) runs over L + 1 positions, in two layers
    "zaya": 2 * 2 * 32 * 16 / L,
}


# Families with convolutions or recurrent states, whose products torch counts padded or in chunks;
# the rest of their products is exact too.
BOUNDED = {
    "bailing_hybrid",
    "glm5_next",
    "granitemoehybrid",
    "inkling",
    "inkling2",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
    "zaya",
}

# Families that count more keys than their masks let through.
WINDOW_MISSED = {
    # a window in the config also applies to layers called "full_attention"; checkpoints have none
    "minimax",
    # bidirectional windows: that both ends of a sequence cut them is not counted
    "openai_privacy_filter",
}


def build(family: families.Family) -> nn.Module:
    config = families.tiny_config(family)
    for key, value in CONFIG.get(family.name, {}).items():
        setattr(config, key, value)
    model = families.model_class(family)._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    families.randomise(model)
    return model.eval()


def inputs_of(model: nn.Module) -> dict:
    inputs = families.tiny_inputs(model)
    inputs.pop("moe_mm_token_type_ids", None)  # ERNIE-VL: text only
    return inputs


def observed(model: nn.Module) -> tuple[float, float, float]:
    """Per token, what torch counts: all but the next two, convolutions, recurrent states."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs_of(model))
    by_module = counter.get_flop_counts()
    recurrent = 0
    for name, module in model.named_modules():
        if recurrence(module):  # projections are mm and addmm, the state's products are bmm
            recurrent += by_module[f"{type(model).__name__}.{name}"][torch.ops.aten.bmm]
    convolution = by_module["Global"].get(torch.ops.aten.convolution, 0)
    rest = counter.get_total_flops() - convolution - recurrent
    return rest / TOKENS, convolution / TOKENS, recurrent / TOKENS


def counted_convolutions(model: nn.Module) -> tuple[float, int]:
    """What the count says about convolutions, and their widest kernel."""
    decoder, _ = text_path(model)
    kernels = {n: m.kernel_size[0] for n, m in decoder.named_modules() if isinstance(m, nn.Conv1d)}
    flops = sum(m.flops for m in decoder_matmuls(decoder) if m.name in kernels)
    return flops, max(kernels.values(), default=1)


@pytest.mark.parametrize("family", families.tested(), ids=lambda f: f.name)
def test_agrees_with_torch(family):
    model = build(family)
    count = count_flops(model)
    rest, convolution, recurrent = observed(model)
    counted, kernel = counted_convolutions(model)
    # Eager attention multiplies masked keys as well: no limit, only strides.
    attention = sum(t.flops_per_key * (L // t.stride) for t in count.attention)
    products = count.weights - counted - count.recurrence + attention
    assert rest == pytest.approx(products + NOT_COUNTED.get(family.name, 0), rel=1e-12)
    # A causal convolution pads both ends and drops the tail: at most kernel - 1 positions too many.
    assert counted <= convolution <= counted * (L + kernel - 1) / L
    # Chunked algorithms multiply more than the recurrence does; Mamba-1 writes its state, half of
    # the count, without a matrix multiplication.
    assert recurrent >= count.recurrence / 2
    assert (convolution + recurrent > 0) == (family.name in BOUNDED)
    assert count.excluded == ()


def test_most_families_are_exact():
    names = {f.name for f in families.tested()}
    assert names >= BOUNDED | set(NOT_COUNTED) | WINDOW_MISSED | set(CONFIG)  # no stale name
    assert len(names - BOUNDED - set(NOT_COUNTED)) >= 45


@pytest.mark.parametrize("family", families.tested(), ids=lambda f: f.name)
def test_causal_keys_are_those_of_the_mask(family):
    """Windows and causality against the masks that the model really builds."""
    model = build(family)
    visible = []

    def look(module, args, kwargs):
        mask = kwargs["attention_mask"]  # (B, 1, L, L): 0 where a query sees a key
        if isinstance(mask, dict):  # Zaya: one for attention, one for its convolutions
            mask = next(m for m in mask.values() if m is not None and m.ndim == 4)
        visible.append((mask == 0).sum().item() / (mask.shape[0] * L))

    modules = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    modules = [m for m in modules if not hasattr(m, "indexer") and not hasattr(m, "compressor")]
    if not modules:
        pytest.skip("every attention layer selects keys by content, or there is none")
    for module in modules:
        module.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs_of(model))
    terms = [t for m in modules for t in attention_of(m)]
    keys = [t.keys_causal(L) for t in terms]
    if family.name in WINDOW_MISSED:
        assert all(k > v for k, v in zip(keys, visible, strict=True))
    else:
        assert keys == pytest.approx(visible)


def tiny(name: str) -> nn.Module:
    return build(families.family(name))


def test_qwen3_30b_by_hand_on_meta():
    config = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        vocab_size=151936,
    )  # fmt: skip
    with torch.device("meta"):
        count = count_flops(AutoModelForCausalLM.from_config(config))
    # q and o: 2048 x 4096; k and v: 2048 x 512
    assert count.linear == 48 * 2 * 2048 * (4096 + 512 + 512 + 4096)
    assert count.experts == 48 * 8 * 6 * 2048 * 768
    assert count.router == 48 * 2 * 2048 * 128
    assert count.head == 2 * 2048 * 151936
    assert count.recurrence == count.frozen == 0
    assert count.attention_full(4096) == 48 * 4 * 4096 * 4096  # 4 * heads * head_dim * L
    assert count.attention_causal(4096) == 48 * 4 * 4096 * (4096 + 1) / 2
    assert count.training_full(4096) == 3 * (count.weights + count.attention_full(4096))
    # what its name promises: about 3.3 billion active parameters, embeddings aside
    assert 2 * 3.0e9 < count.weights < 2 * 3.4e9


def test_deepseek_v3_by_hand_on_meta():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(num_hidden_layers=5))
    count = count_flops(model)
    assert count.experts == 2 * 8 * 6 * 7168 * 2048  # 3 of the 5 layers are dense; groups, top-8
    assert count.router == 2 * 2 * 7168 * 256
    # latent attention: q 7168 -> 1536 -> 128 x 192; kv 7168 -> 512 + 64, 512 -> 128 x (128 + 128)
    mla = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    dense, shared = 3 * 3 * 7168 * 18432, 2 * 3 * 7168 * 2048
    assert count.linear == 2 * (5 * mla + dense + shared)
    assert count.attention_full(1) == 5 * 2 * 128 * (192 + 128)


def test_windows_by_hand():
    window = AttentionTerm(flops_per_key=1.0, limit=3, stride=1, causal=True)
    assert [window.keys_full(n) for n in (1, 2, 3, 4)] == [1, 2, 3, 3]
    assert window.keys_causal(5) == (1 + 2 + 3 + 3 + 3) / 5
    compressed = AttentionTerm(flops_per_key=1.0, limit=2, stride=4, causal=True)
    assert [compressed.keys_full(n) for n in (3, 4, 8, 100)] == [0, 1, 2, 2]
    assert compressed.keys_causal(8) == (0 + 0 + 0 + 1 + 1 + 1 + 1 + 2) / 8
    both_ways = AttentionTerm(flops_per_key=1.0, limit=None, stride=1, causal=False)
    assert both_ways.keys_causal(7) == both_ways.keys_full(7) == 7


def test_gpt_oss_has_a_windowed_and_a_full_layer():
    count = count_flops(tiny("gpt_oss"))
    per_key = 2 * 4 * (16 + 16)
    assert count.attention_full(100) == per_key * (8 + 100)
    assert count.attention_causal(100) == per_key * ((36 + 92 * 8) / 100 + 50.5)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("qwen3_next", 6 * 4 * 8 * 8),  # one delta-rule layer: 4 heads, 8 x 8 state
        ("kimi_linear", 2 * 6 * 4 * 8 * 8),
        ("bailing_hybrid", 2 * 6 * 4 * 16 * 16),
        ("nemotron_h", 4 * 4 * 16 * 8),  # one Mamba-2 layer: 4 heads x 16, state 8
        ("jamba", 2 * 4 * 64 * 8),  # two Mamba-1 layers: 64 channels, state 8
        ("minimax", 4 * 4 * 16 * 16),  # one lightning attention layer: 4 heads, 16 x 16 state
    ],
)
def test_recurrence_by_hand(name, expected):
    assert count_flops(tiny(name)).recurrence == expected


def test_sharded_experts_count_whole():
    """Four expert-parallel ranks, imitated by a process group that never communicates."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = tiny("qwen3_moe")
    whole = count_flops(model)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for module in families.experts_modules(model).values():
            for name, parameter in list(module.named_parameters(recurse=False)):
                local = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
                setattr(module, name, nn.Parameter(local))
            module.num_experts = 3
        for layer in model.model.layers:
            weight = distribute_tensor(layer.self_attn.q_proj.weight.data, mesh, [Shard(0)])
            layer.self_attn.q_proj.weight = nn.Parameter(weight)
        assert isinstance(module.down_proj, DTensor)
        assert module.down_proj.to_local().shape[0] == 3
        assert count_flops(model) == whole
    finally:
        torch.distributed.destroy_process_group()


def test_deepspeed_shapes_count_whole():
    model = tiny("qwen3_moe")
    whole = count_flops(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert count_flops(model) == whole


def test_flattened_experts_are_refused():
    model = tiny("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().flatten())
    with pytest.raises(ValueError, match="layers.0.mlp.experts.*3 dimensions"):
        count_flops(model)


def test_missing_top_k_is_refused():
    model = tiny("qwen3_moe")
    for layer in model.model.layers:
        del layer.mlp.gate.top_k
        layer.mlp.experts.config = PreTrainedConfig()
    with pytest.raises(ValueError, match="top_k"):
        count_flops(model)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear is not a decoder"):
        count_flops(nn.Linear(2, 2))
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(num_layers=1))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not a decoder"):
        count_flops(t5)


def test_lora_adds_adapters_and_drops_frozen_weight_gradients():
    whole = count_flops(tiny("qwen3_moe"))
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    count = count_flops(get_peft_model(tiny("qwen3_moe"), config))
    adapters = 2 * 2 * 3 * (32 + 32)  # two layers, q_proj is 32 -> 32
    assert count.linear == whole.linear + adapters
    assert count.frozen == whole.weights
    assert count.training_full(L) == 3 * count.forward_full(L) - whole.weights


def test_lora_on_experts_counts_the_active_share():
    config = LoraConfig(
        r=3,
        target_parameters=["mlp.experts.gate_up_proj"],
        target_modules=[],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny("qwen3_moe"), config)
    whole, count = count_flops(tiny("qwen3_moe")), count_flops(model)
    # two of six experts: H 32 -> 3 -> 2I 48, in two layers
    assert count.experts == whole.experts + 2 * 2 * 2 * 3 * (32 + 48)
    assert count.linear == whole.linear


def test_modules_to_save_count_once():
    whole = count_flops(tiny("qwen3_moe"))
    config = LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM"
    )
    count = count_flops(get_peft_model(tiny("qwen3_moe"), config))
    assert count.linear == whole.linear + 2 * 2 * 3 * (32 + 32)
    assert count.attention_full(L) == whole.attention_full(L)


def test_vision_tower_is_named_and_left_out():
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "vocab_size": 128, "intermediate_size": 48,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        count, decoder = count_flops(model), count_flops(model.get_decoder())
    assert count.excluded == ("model.visual",)
    assert count.head == 2 * 32 * 128
    assert count.weights == decoder.weights + count.head
    assert decoder.linear == 2 * 2 * 32 * (64 + 32 + 32 + 64)
