"""A ZAYA checkpoint, saved and loaded: the router's bias of the expert that does nothing.

`_init_weights` runs over loaded modules too, and sets that element by plain indexing, which does
not see that the buffer came from the checkpoint: it is -1 again, and tokens go to other experts.
"""


def test_zaya_router_bias(tmp_path):
    import torch
    from transformers import ZayaConfig, ZayaForCausalLM

    config = ZayaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, router_hidden_size=16,
    )  # fmt: skip
    model = ZayaForCausalLM(config)
    trained = torch.tensor([0.1, -0.1, 0.2, -0.2, 0.5])
    model.model.layers[0].mlp.gate.balancing_biases.copy_(trained)
    model.save_pretrained(tmp_path)
    loaded = ZayaForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.gate.balancing_biases
    assert torch.equal(loaded, trained), f"saved {trained[-1]:.1f}, loaded {loaded[-1]:.1f}"
