"""Ulysses in transformers' Trainer and every TRL trainer, through their arguments alone."""

from __future__ import annotations

from accelerate import ParallelismConfig
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .ulysses import enable_sequence_parallel

REPORT_NAME = "sequence_parallel"  # in TrainingArguments.report_to


def share_batches(args: TrainingArguments, sp_size: int) -> None:
    """Prepares `args`, before a trainer is made, for a model whose DistributedConfig has `sp_size`.

    The data loader gives groups of `sp_size` consecutive ranks the same batch, so
    `per_device_train_batch_size` is per group; and `SequenceParallelCallback` is added, through
    `report_to`. Loss, gradients, gradient norm, logged loss and TRL's metrics are then those of a
    run with one process per group; batches need no multiple of sp_size.

    Raises:
        ValueError: `sp_size` does not divide the processes, `args.parallelism_config` says
            something else, or an argument that needs the logits of whole sequences.
    """
    if sp_size == 1:
        return
    if args.world_size % sp_size:
        raise ValueError(f"sp_size={sp_size} does not divide the {args.world_size} processes")
    if args.parallelism_config is not None:
        raise ValueError("parallelism_config is given: leave it out, sp_size sets it")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs the logits of whole "
            "sequences, which no rank has with sp_size; set it to 0"
        )
    if getattr(args, "loss_type", None) == "dft":
        raise ValueError(
            "loss_type='dft' needs the logits of whole sequences, which no rank has with sp_size; "
            "use 'nll'"
        )
    args.parallelism_config = SharedBatches(
        tp_size=sp_size, dp_shard_size=args.world_size // sp_size
    )
    INTEGRATION_TO_CALLBACK[REPORT_NAME] = SequenceParallelCallback
    if REPORT_NAME not in args.report_to:
        args.report_to = [*args.report_to, REPORT_NAME]


class SharedBatches(ParallelismConfig):
    """Groups of `tp_size` ranks read the same batch: accelerate's word for that is "tp".

    The model is sharded when it is loaded; accelerate shards nothing by this.
    """

    def _validate_accelerator(self, accelerator) -> None:
        """As accelerate's, which also refuses CPUs."""
        if self.total_size != accelerator.num_processes:
            raise ValueError(
                f"made for {self.total_size} processes, and there are {accelerator.num_processes}"
            )


class SequenceParallelCallback(TrainerCallback):
    """Calls `enable_sequence_parallel` on the trainer's model; `share_batches` adds it."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        sp_size = getattr(model.config.distributed_config, "sp_size", None) or 1
        layout = args.parallelism_config
        if sp_size > 1 and (layout is None or layout.tp_size != sp_size):
            raise ValueError(
                f"sp_size={sp_size}, but the ranks of a group would read different batches; call "
                "hf_moe_ep.sequence_parallel.share_batches(args, sp_size) before making the trainer"
            )
        enable_sequence_parallel(model)
