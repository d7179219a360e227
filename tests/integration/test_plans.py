"""Rules per family, from a model's modules: they cover every expert, agree with transformers' own,
and what a rank holds under them is what transformers shards, in a pretended group of processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Cohere2MoeConfig, DeepseekV3Config, MellumConfig, Qwen3MoeConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.utils import initialize_distributed_mesh
from transformers.initialization import no_tie_weights

from hf_moe_ep import DistributedConfig, plans
from hf_moe_ep.plans.shards import local_shapes
from tests import families

FAMILIES = families.tested()


def meta(family):
    """As from_pretrained builds it: on the meta device, with tied weights still apart."""
    with torch.device("meta"), no_tie_weights():
        return families.model_class(family)(families.tiny_config(family))


def sharded_by_transformers(model, config):
    """Parameter name -> shape on rank 0, after transformers sharded `model` for `config`."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.world_size)
    try:
        _, mesh = initialize_distributed_mesh(config)
        model = type(model).maybe_distribute_model(model, config, mesh)
        parameters = model.named_parameters()
        return {
            n: tuple((p.to_local() if isinstance(p, DTensor) else p).shape) for n, p in parameters
        }
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_ep_rules_are_those_of_the_family(family):
    model = meta(family)
    found, own = plans.ep_plan(model), model.ep_plan
    assert list(found.values()).count("ep_dispatch_experts") >= 1
    experts = {rule: style for rule, style in own.items() if "experts" in rule}
    assert found == experts


def test_ep_rules_are_written_out_where_a_model_has_none():
    model = meta(families.family("gpt_oss"))
    model.ep_plan = {}
    config = DistributedConfig.for_model(model, ep_size=2, fsdp_size=2)
    assert config.ep_plan == plans.ep_plan(model)
    assert len(config.ep_plan) == 5  # two weights, two biases, the module
    complete = meta(families.family("gpt_oss"))
    assert DistributedConfig.for_model(complete, ep_size=2, fsdp_size=2).ep_plan is None


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_what_a_rank_holds(family):
    """Two layouts: ep over 2 of 4 fsdp ranks; and one of the tp axis, dense modules whole."""
    for fields in (dict(fsdp_size=4, ep_size=2), dict(tp_size=2, ep_size=2, tp_plan={})):
        model = meta(family)
        config = DistributedConfig.for_model(model, ep_implementation="all_to_all", **fields)
        expected = local_shapes(model, config)
        assert sharded_by_transformers(model, config) == expected


TP_LAYOUTS = [
    dict(tp_size=2),
    dict(tp_size=2, ep_size=2),
    dict(tp_size=2, fsdp_size=3, ep_size=2),
    dict(tp_size=2, fsdp_size=2, dp_replicate_size=2, ep_size=2),
]


@pytest.mark.parametrize("fields", TP_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "cohere2_moe"])
def test_what_a_rank_holds_with_tp(name, fields):
    model = meta(families.family(name))
    config = DistributedConfig.for_model(model, ep_implementation="all_to_all", **fields)
    expected = local_shapes(model, config)
    assert sharded_by_transformers(model, config) == expected
    whole = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(map(torch.Size.numel, map(torch.Size, expected.values()))) < sum(whole.values())


@pytest.mark.grid
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_what_a_rank_holds_with_tp_in_every_family(family):
    for fields in TP_LAYOUTS:
        model = meta(family)
        if not model.tp_plan:
            with pytest.raises(ValueError, match="no tensor-parallel rules"):
                DistributedConfig.for_model(model, **fields)
            continue
        config = DistributedConfig.for_model(model, ep_implementation="all_to_all", **fields)
        expected = local_shapes(model, config)
        assert sharded_by_transformers(model, config) == expected


SIZES = {
    k: v
    for k, v in families.SIZES.items()
    if k
    in (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "moe_intermediate_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
}
SIZES |= {"num_hidden_layers": 3}
# Dense and sparse layers in one model: config -> which of its three layers are sparse.
MIXED = {
    "qwen3_moe": (Qwen3MoeConfig(**SIZES, num_experts=6, mlp_only_layers=[1]), [0, 2]),
    "qwen3_moe_step": (Qwen3MoeConfig(**SIZES, num_experts=6, decoder_sparse_step=2), [1]),
    "deepseek_v3": (
        DeepseekV3Config(**SIZES, n_routed_experts=6, n_group=1, topk_group=1, q_lora_rank=16,
                         kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
                         first_k_dense_replace=2), [2]),
    "cohere2_moe": (Cohere2MoeConfig(**SIZES, num_experts=6, first_k_dense_replace=1), [1, 2]),
    "mellum": (MellumConfig(**SIZES, num_experts=6, mlp_layer_types=["sparse", "dense", "sparse"]),
               [0, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("tp", ["own", "replicate"])
def test_dense_and_sparse_layers_mixed(name, tp):
    """Experts of the sparse layers go over ep, the MLPs of the dense ones over tp, each once."""
    config, sparse = MIXED[name]
    with no_tie_weights():
        model = plans.meta_model(config)
    experts = plans.experts_modules(model)
    assert sorted(int(n.split(".")[2]) for n in experts) == sparse
    plan = {"tp_plan": {}} if tp == "replicate" else {}
    layout = DistributedConfig.for_model(
        model, tp_size=2, ep_size=2, ep_implementation="all_to_all", **plan
    )
    before = {n: tuple(p.shape) for n, p in model.named_parameters()}
    held = local_shapes(model, layout)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        names = [n for n in held if n.startswith(prefix)]
        if layer in sparse:
            for n in (f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"):
                assert held[n] == (before[n][0] // 2, *before[n][1:])
        else:
            split = tp == "own"
            assert not any("experts" in n for n in names)
            assert all((held[n] != before[n]) == split for n in names)
    assert sharded_by_transformers(model, layout) == held


@pytest.mark.parametrize("name", ["gemma4", "diffusion_gemma"])
def test_dense_modules_in_an_ep_plan_are_left_whole_beside_fsdp(name):
    """transformers' rules shard these MLPs over ep, which FSDP2 on another axis cannot take."""
    model = meta(families.family(name))
    dense = {rule for rule, style in model.ep_plan.items() if style in ("colwise", "rowwise")}
    assert len(dense) == 3
    with pytest.raises(ValueError, match="for_model"):
        plans.require(plans.model_checks(model, DistributedConfig(ep_size=2, fsdp_size=2)))
    config = DistributedConfig.for_model(model, ep_size=2, fsdp_size=2)
    assert config.ep_plan == dict.fromkeys(dense, "replicate")
    assert DistributedConfig.for_model(model, ep_size=2, tp_size=2).ep_plan is None


def test_replicated_dense_modules_need_no_rules_of_the_model():
    model = meta(families.family("zaya"))  # has no tp rules
    assert not model.tp_plan
    config = DistributedConfig.for_model(model, tp_size=2, ep_size=2, tp_plan={})
    assert config.tp_plan == {"": "replicate"}
    assert set(plans.replicate_plan(meta(families.family("mixtral"))).values()) == {"replicate"}
    assert all(style in ALL_PARALLEL_STYLES for style in config.tp_plan.values())
