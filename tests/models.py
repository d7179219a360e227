"""Configs of published models, written out so that no test needs a network; sizes from their cards.

Parameter counts are the published totals, in units of 1e9.
"""

from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

QWEN3 = dict(
    vocab_size=151936, head_dim=128, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
    norm_topk_prob=True, max_position_embeddings=262144, tie_word_embeddings=False,
    architectures=["Qwen3MoeForCausalLM"],
)  # fmt: skip
GPT_OSS = dict(
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
    num_key_value_heads=8, head_dim=64, sliding_window=128, num_experts_per_tok=4,
    tie_word_embeddings=False, architectures=["GptOssForCausalLM"],
)  # fmt: skip


def configs() -> dict[str, PreTrainedConfig]:
    """Name -> a fresh config, for every model of this file."""
    return {
        "qwen3-30b-a3b": Qwen3MoeConfig(
            **QWEN3, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, num_attention_heads=32),
        "qwen3-235b-a22b": Qwen3MoeConfig(
            **QWEN3, hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
            num_hidden_layers=94, num_attention_heads=64),
        "deepseek-v3": DeepseekV3Config(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
            num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256,
            num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512,
            qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_group=8, topk_group=4,
            tie_word_embeddings=False, architectures=["DeepseekV3ForCausalLM"]),
        "glm-4.5-air": Glm4MoeConfig(
            vocab_size=151552, hidden_size=4096, intermediate_size=10944,
            moe_intermediate_size=1408, num_hidden_layers=46, num_attention_heads=96,
            num_key_value_heads=8, head_dim=128, attention_bias=True, n_shared_experts=1,
            n_routed_experts=128, num_experts_per_tok=8, first_k_dense_replace=1,
            tie_word_embeddings=False, architectures=["Glm4MoeForCausalLM"]),
        "gpt-oss-120b": GptOssConfig(**GPT_OSS, num_hidden_layers=36, num_local_experts=128),
        "olmoe-1b-7b": OlmoeConfig(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
            tie_word_embeddings=False, architectures=["OlmoeForCausalLM"]),
    }  # fmt: skip


# Of the cards: 30.5, 235, 671 (without its extra prediction layer), 106 (the same), 117 and 6.9.
PARAMETERS = {
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.0,
    "deepseek-v3": 671.0,
    "glm-4.5-air": 106.0,
    "gpt-oss-120b": 117.0,
    "olmoe-1b-7b": 6.9,
}
