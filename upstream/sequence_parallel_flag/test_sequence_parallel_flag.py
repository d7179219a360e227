"""`DistributedConfig(enable_sequence_parallel=True)`: it shards sequences, or is refused.

It is taken and ignored: every rank keeps the activations of the whole sequence.
"""

from upstream.helpers import run, sharded, tiny_model, tokens


def sequence_is_sharded_or_refused():
    from transformers.distributed import DistributedConfig

    try:
        config = DistributedConfig(tp_size=2, enable_sequence_parallel=True)
        model = sharded(tiny_model(), distributed_config=config)
    except (ValueError, NotImplementedError) as error:
        assert "enable_sequence_parallel" in str(error), error
        return
    seen = []
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    model(input_ids=tokens(1))
    assert seen == [6], f"a norm got {seen[0]} of 12 tokens, tp_size 2"


def test_sequence_parallel_flag():
    run(2, sequence_is_sharded_or_refused)
