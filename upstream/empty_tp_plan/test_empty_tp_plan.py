"""Expert parallelism on replicated dense layers: `ep_size=tp_size, tp_plan={}`.

`DistributedConfig` documents it ("An empty dictionary applies no tensor parallel rule") and its
deprecation warning recommends it; loading raises that the model has no `tp_plan`.
"""

from upstream.helpers import run, sharded, tiny_model, tokens


def loads_and_computes_the_same():
    from transformers.distributed import DistributedConfig

    expected = tiny_model()(input_ids=tokens(2)).logits
    config = DistributedConfig(tp_size=2, ep_size=2, tp_plan={})
    model = sharded(tiny_model(), distributed_config=config)
    assert model.model.layers[0].mlp.experts.down_proj.to_local().shape[0] == 2
    error = (model(input_ids=tokens(2)).logits - expected).abs().max().item()
    assert error < 1e-4, error


def test_empty_tp_plan():
    run(2, loads_and_computes_the_same)
