"""An expert-parallel style of one's own: a subclass registered in `ALL_PARALLEL_STYLES`.

The plan passes validation and is then ignored, because the code looks for the one name
"ep_dispatch_experts": every rank holds and trains every expert.
"""

from upstream.helpers import run, sharded, tiny_model, tokens


def custom_style_shards_experts():
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    class MyDispatch(EpDispatchExpertsParallel):
        pass

    ALL_PARALLEL_STYLES.register("my_dispatch", MyDispatch())
    expected = tiny_model()(input_ids=tokens(2)).logits
    config = DistributedConfig(
        fsdp_size=2, ep_size=2, ep_plan={"model.layers.*.mlp.experts": "my_dispatch"}
    )
    model = sharded(tiny_model(), distributed_config=config)
    held = model.model.layers[0].mlp.experts.num_experts
    assert held == 2, f"a rank of two holds {held} of 4 experts"
    error = (model(input_ids=tokens(2)).logits - expected).abs().max().item()
    assert error < 1e-4, error


def test_custom_ep_style():
    run(2, custom_style_shards_experts)
