"""A Trainer whose model was sharded at load saves its optimizer, and resumes where it stopped.

The functions that save and load both exist (`transformers.distributed.checkpoint`); the Trainer
refuses to be built instead of calling them.
"""

from upstream.helpers import full, run, sharded, tiny_model, tokens


def weights_after_four_steps(folder: str, seed: int, checkpoint: str | None = None):
    from transformers import Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    model = sharded(tiny_model(seed), distributed_config=DistributedConfig(fsdp_size=2, ep_size=2))
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8)]
    Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def resumed_run_equals_the_whole_one(folder: str):
    expected = weights_after_four_steps(folder, seed=0)
    # Another start: what agrees in the end came from the checkpoint.
    actual = weights_after_four_steps(folder, seed=1, checkpoint=f"{folder}/checkpoint-2")
    wrong = [name for name, want in expected.items() if not actual[name].equal(want)]
    assert not wrong, f"differs after resuming: {wrong}"


def test_checkpoint_sharded_model(tmp_path):
    run(2, resumed_run_equals_the_whole_one, str(tmp_path))
