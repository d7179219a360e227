"""`ep_implementation="all_reduce"`, eager experts, and a rank whose experts get no token.

The loop of that rank returns zeros without a graph, so its backward skips the all-reduces that the
other ranks start. On gloo the next collective then meets another one's data and the process ends;
here the graph is looked at before that.
"""

from upstream.helpers import full, run, sharded, tiny_model, tokens


def one_sided_model():
    """Every token goes to expert 0 or 1, which are rank 0's."""
    import torch

    model = tiny_model(num_experts_per_tok=1)
    for layer in model.model.layers:
        row = torch.randn(layer.mlp.gate.weight.shape[1])
        layer.mlp.gate.weight.data = torch.stack([-row, row, 0 * row, 0 * row])
    return model


def every_rank_joins_the_backward():
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    reference, ids = one_sided_model(), tokens(1)
    reference.set_experts_implementation("eager")
    reference(input_ids=ids, labels=ids).loss.backward()

    model = sharded(
        one_sided_model(),
        distributed_config=DistributedConfig(tp_size=2, ep_size=2, ep_implementation="all_reduce"),
        experts_implementation="eager",
    )
    attached = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(
            lambda module, inputs, output: attached.append(output.requires_grad)
        )
    loss = model(input_ids=ids, labels=ids).loss
    per_rank = [None, None]
    dist.all_gather_object(per_rank, all(attached))
    assert all(per_rank), f"experts' output has a graph on ranks 0 and 1: {per_rank}"

    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        got, want = full(parameter.grad), expected[name]
        error = (got - want).abs().max() / want.abs().max()
        assert error < 1e-4 or (not want.any() and not got.any()), f"{name}: {error}"


def test_all_reduce_empty_rank():
    run(2, every_rank_joins_the_backward)
