"""hf_moe_ep.DistributedConfig: what it takes, what it refuses and why, and that it travels."""

import json
import pickle

import pytest
import transformers
from transformers import Qwen3MoeConfig
from transformers.distributed import DistributedConfig as Theirs

import hf_moe_ep
from hf_moe_ep import DistributedConfig, plans
from tests import families

SMALL = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_dim=8, moe_intermediate_size=8, num_experts=6)


@pytest.fixture(scope="module")
def config():
    return Qwen3MoeConfig(**SMALL, architectures=["Qwen3MoeForCausalLM"])


def test_it_is_theirs_and_travels(tmp_path):
    ours = DistributedConfig(ep_size=2, tp_size=1, fsdp_size=4, sp_size=2, tp_plan={"a": "colwise"})
    assert isinstance(ours, Theirs) and hf_moe_ep.DistributedConfig is DistributedConfig
    assert (ours.sp_size, ours.efsdp_size, ours.dp_size, ours.world_size) == (2, 2, 4, 4)
    assert DistributedConfig.from_dict(ours.to_dict()) == ours
    assert pickle.loads(pickle.dumps(ours)) == ours
    ours.to_json_file(tmp_path / "layout.json")
    written = json.loads((tmp_path / "layout.json").read_text())
    assert DistributedConfig.from_dict(written) == ours
    assert repr(ours).startswith("DistributedConfig {") and '"sp_size": 2' in repr(ours)


def test_defaults_are_theirs():
    theirs, ours = Theirs().to_dict(), DistributedConfig().to_dict()
    assert ours == theirs | {"sp_size": 1, "sp_plan": None}


def test_a_model_config_that_carries_one_is_saved(config, tmp_path):
    config.distributed_config = DistributedConfig(fsdp_size=2, sp_size=2)
    config.save_pretrained(tmp_path)
    del config.distributed_config
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path), "distributed_config")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'DistributedConfigs'"):
        hf_moe_ep.DistributedConfigs  # noqa: B018


REFUSED = [
    (dict(sp_size=0), "sp_size=0: give 1 or more"),
    (dict(ep_size=-1), "ep_size=-1: Parallelism sizes"),
    (dict(sp_size=2), r"does not divide fsdp_size=1.*choose sp_size among \[1\]"),
    (dict(sp_size=4, fsdp_size=6), r"choose sp_size among \[1, 2, 3, 6\]"),
    (dict(sp_size=2, tp_size=2, fsdp_size=2), "use sp_size with tp_size=1"),
    (dict(enable_sequence_parallel=True), "give tp_size, or sp_size instead"),
    (dict(enable_sequence_parallel=True, tp_size=2), r"DistributedConfig.for_model\(model"),
    (
        dict(enable_sequence_parallel=True, tp_size=2, ep_size=2, tp_plan={"a": "b"}),
        "ep_implementation='auto'.*sequence_sharded",
    ),
    (dict(sp_plan={"lm_head": "replicate"}), "sp_plan does nothing"),
    (dict(ep_size=3, fsdp_size=4), "ep_size=3, fsdp_size=4: `ep_size` must divide"),
    (dict(ep_size=3, tp_size=2, fsdp_size=3), "must be a multiple of `tp_size`"),
    (dict(ep_size=2, tp_size=2, pp_size=2), "pp_size=2 with ep_size=2 is not supported"),
    (dict(sp_size=2, fsdp_size=2, pp_size=2), "with pipeline parallelism is not supported"),
    (dict(ep_implementation="magic"), "choose one of auto, all_to_all, all_reduce"),
    (dict(ep_size=2, fsdp_size=2, ep_implementation="all_reduce"), "needs ep_size == tp_size"),
    (dict(tp_size=2, tp_plan={"model.norm": "sequence_parallel"}), "times too large"),
    (dict(tp_size=2, ep_size=2, tp_plan={}), r"refuses an empty plan.*for_model\(model, tp_plan"),
    (dict(tp_size=2, enable_expert_parallel=True), "give ep_size too"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=str)
def test_what_cannot_work_is_refused_where_it_is_made(fields, reason):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        DistributedConfig(**fields)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match=r"unknown ep_sise \(did you mean ep_size\?\)"):
        DistributedConfig.from_dict({"ep_sise": 2})


MODEL_REFUSED = [
    (dict(ep_size=4, fsdp_size=4), r"experts: 6 do not divide by ep_size=4; .* \[1, 2, 3, 6\]"),
    (dict(tp_size=4), "num_key_value_heads: 2 do not divide by tp_size=4"),
    (dict(fsdp_size=3, sp_size=3), r"num_attention_heads: 4 do not divide by sp_size=3"),
    (dict(ep_size=2, fsdp_size=2, ep_plan={"model.layers.*.mlp.expert": "ep_dispatch_experts"}),
     "'model.layers.*.mlp.expert' matches nothing in Qwen3MoeForCausalLM; did you mean 'model"),
    (dict(ep_size=2, fsdp_size=2, ep_plan={"model.layers.*.mlp.experts": "replicate"}),
     "'replicate' and would stay whole on every rank"),
    (dict(tp_size=2, tp_plan={"lmhead": "colwise"}), "did you mean 'lm_head'"),
    (dict(tp_size=2, enable_sequence_parallel=True), "ep_size=1 with tp_size=2.*give ep_size"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), MODEL_REFUSED, ids=str)
def test_what_a_model_cannot_do_is_refused_from_its_config(config, fields, reason):
    with pytest.raises(ValueError, match=reason):
        DistributedConfig.for_model(config, **fields)


def test_a_plan_that_leaves_experts_whole_stops_loading():
    """transformers calls this with the merged rules of the model, before it reads weights."""
    config = DistributedConfig(ep_size=2, fsdp_size=2)
    with pytest.raises(ValueError, match="every rank would keep all experts"):
        config._validate_resolved_ep_plan({"layers.*.mlp.experts": "my_dispatch"})
    config._validate_resolved_ep_plan({"layers.*.mlp.experts": "ep_dispatch_experts"})


@pytest.mark.parametrize("length", [63, 64])
@pytest.mark.parametrize("sizes", [dict(fsdp_size=2, sp_size=2), dict(fsdp_size=2)], ids=str)
def test_sequence_length(config, length, sizes):
    checks = plans.model_checks(plans.meta_model(config), DistributedConfig(**sizes), length)
    found = {c.detail: c.status for c in checks if c.name == "sequence length"}
    if "sp_size" not in sizes:
        assert not found
    elif length == 63:
        assert found == {"63 over sp_size=2: 32 each, after padding to 64": "note"}
    else:
        assert found == {"64 over sp_size=2: 32 each": "ok"}


def test_sequences_over_the_tp_axis(config):
    """The rules come from the model, and experts get the tokens that each rank holds."""
    found = DistributedConfig.for_model(
        config, tp_size=2, ep_size=2, enable_sequence_parallel=True, sp_plan={"lm_head": "colwise"}
    )
    assert found.ep_implementation == "sequence_sharded"
    assert found.tp_plan == plans.sp_plan(plans.meta_model(config)) | {"lm_head": "colwise"}
    assert found.tp_plan["model.layers.*"] == "sp_layer"
    assert DistributedConfig.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("name", ["lfm2_moe", "jamba", "deepseek_v32"])
def test_layers_with_a_state_cannot_share_a_sequence(name):
    config = families.tiny_config(families.family(name))
    with pytest.raises(ValueError, match="along the sequence .*use sp_size=1"):
        DistributedConfig.for_model(config, fsdp_size=2, sp_size=2)


def test_models_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="its config cannot be read"):
        plans.meta_model(str(tmp_path / "nowhere"))
    remote = Qwen3MoeConfig(**SMALL, architectures=["SomebodysMoe"])
    with pytest.raises(ValueError, match="SomebodysMoe is not in transformers"):
        plans.meta_model(remote)


def test_a_vision_language_model_is_read_by_its_own_class():
    config = transformers.Qwen3VLMoeConfig(architectures=["Qwen3VLMoeForConditionalGeneration"])
    model = plans.meta_model(config)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert plans.experts_modules(model)


# (purpose, world, given) -> (tp, fsdp, ep, dp_replicate), by hand: 4 heads, 2 key heads, 6 experts.
DEFAULTS = [
    ("inference", 2, {}, (2, 1, 2, 1)),
    ("inference", 6, {}, (6, 1, 6, 1)),  # heads do not divide: dense modules are replicated
    ("training", 2, {}, (1, 2, 2, 1)),
    ("training", 8, {}, (1, 8, 2, 1)),
    ("training", 12, {}, (1, 12, 6, 1)),
    ("training", 12, {"gpus_per_node": 4}, (1, 12, 3, 1)),
    ("training", 12, {"dp_replicate_size": 2}, (1, 6, 6, 2)),
    ("training", 1, {}, (1, 1, 1, 1)),
]


@pytest.mark.parametrize(("purpose", "world", "given", "sizes"), DEFAULTS)
def test_defaults_by_purpose(config, purpose, world, given, sizes):
    found = DistributedConfig.for_model(config, purpose, world, **given)
    assert (found.tp_size, found.fsdp_size, found.ep_size, found.dp_replicate_size) == sizes
    assert found.world_size == world
    replicated = set((found.tp_plan or {}).values()) == {"replicate"}
    assert replicated == (purpose == "inference" and world == 6)


def test_an_unknown_purpose_is_refused(config):
    with pytest.raises(ValueError, match="choose 'training' or 'inference'"):
        DistributedConfig.for_model(config, "fun")
