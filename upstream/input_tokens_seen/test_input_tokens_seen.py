"""`num_input_tokens_seen` with tensor parallelism, whose ranks read the same tokens.

The Trainer sums over all ranks, so that the count is tp_size times what was read.
"""

from upstream.helpers import run, sharded, tiny_model, tokens


def tokens_are_counted_once(folder: str):
    from transformers import Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig

    arguments = TrainingArguments(
        output_dir=folder, include_num_input_tokens_seen="all", use_cpu=True, report_to="none"
    )
    # Built around a whole model, since accelerate 1.15 takes no tensor parallelism on CPUs.
    trainer = Trainer(tiny_model(), arguments)
    trainer.model = sharded(tiny_model(), distributed_config=DistributedConfig(tp_size=2))
    trainer._track_num_input_tokens({"input_ids": tokens(1)})
    seen = trainer.state.num_input_tokens_seen
    assert seen == 12, f"num_input_tokens_seen is {seen} after one row of 12 tokens"


def test_input_tokens_seen(tmp_path):
    run(2, tokens_are_counted_once, str(tmp_path))
