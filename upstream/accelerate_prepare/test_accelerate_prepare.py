"""`Accelerator.prepare` with a model that `from_pretrained(distributed_config=...)` has sharded.

Without a parallelism config it wraps the DTensors in DDP, which raises. With TP and FSDP2 it shards
what is sharded already, and imports a `ReplicateParallel` for it that transformers 5.23 lacks.
"""

from types import SimpleNamespace

import pytest

from upstream.helpers import full, run, sharded, tiny_model, tokens


def prepared_model_trains(tp_with_fsdp2: bool):
    import torch
    from accelerate import Accelerator
    from transformers.distributed import DistributedConfig

    class Fsdp2OnCpu(Accelerator):  # accelerate takes FSDP2 on accelerators alone
        is_fsdp2 = True

    accelerator = Accelerator(cpu=True)
    if tp_with_fsdp2:
        accelerator.__class__ = Fsdp2OnCpu
        parallelism = SimpleNamespace(tp_enabled=True, cp_enabled=False)
        accelerator.state.parallelism_config = parallelism
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    model = sharded(tiny_model(), distributed_config=config)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ids = tokens(2)
    mine = ids[accelerator.process_index :][:1]
    accelerator.backward(model(input_ids=mine, labels=mine).loss)

    reference = tiny_model()
    reference(input_ids=ids, labels=ids).loss.backward()
    for name, want in reference.named_parameters():
        error = (full(model.get_parameter(name).grad) - want.grad).abs().max()
        assert error < 1e-4 * want.grad.abs().max(), f"{name}: {error}"


@pytest.mark.parametrize("tp_with_fsdp2", [False, True])
def test_accelerate_prepare(tp_with_fsdp2):
    run(2, prepared_model_trains, tp_with_fsdp2)
