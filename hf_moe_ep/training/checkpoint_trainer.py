"""Checkpoint and resume for transformers' Trainer and TRL's trainers, where the model is sharded.

    class MyTrainer(ShardedCheckpointMixin, SFTTrainer): ...

transformers 5.23 refuses both; the rest of Trainer (steps, data order, callbacks) stays its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    SaveStrategy,
    sort_checkpoints,
)

from . import checkpoint_files as files
from .checkpoint import (
    SCHEDULER,
    CheckpointSaver,
    check_match,
    load_model,
    load_optimizer,
    load_scheduler,
)
from .checkpoint_export import export_model


class ShardedCheckpointMixin:
    """Put it before Trainer, or a trainer of TRL, in the bases of your class.

    With a model from `from_pretrained(distributed_config=...)`, `checkpoint-<step>` holds model,
    optimizer, scheduler, gradient scaler, random number states and the Trainer's state, whole or
    not at all; `train(resume_from_checkpoint=...)` loads it in any layout, and continues bit for
    bit in the same one. `save_model` writes the hub's safetensors without gathering the model.
    With any other model it only adds loading such checkpoints; saving stays Trainer's.

    async_save (class attribute): write checkpoints in a background thread (CheckpointSaver).
    """

    async_save = False

    def __init__(self, *args, **kwargs):
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)]
        whole = [a for a in given if not a.save_only_model]
        for a in whole:  # Trainer's constructor refuses a sharded model otherwise
            a.save_only_model = True
        try:
            super().__init__(*args, **kwargs)
        finally:
            for a in whole:
                a.save_only_model = False
        if whole:
            self.args.save_only_model = False
        self._saver = CheckpointSaver(self.async_save)
        if self._saves_shards and self.args.push_to_hub:
            if self.args.hub_strategy != HubStrategy.END:
                raise ValueError(
                    f"hub_strategy={self.args.hub_strategy.value!r} pushes checkpoints, and those "
                    "of a sharded model are not for the hub; use hub_strategy='end'"
                )

    @property
    def _saves_shards(self) -> bool:
        return self.is_distributed_loading_by_transformers and not self.args.save_only_model

    def train(self, *args, **kwargs):
        """Trainer.train; a save in flight is finished also when training ends in an exception."""
        if self._saves_shards and self.args.should_save:
            files.discard_leftovers(Path(self.args.output_dir))
        try:
            return super().train(*args, **kwargs)
        finally:
            self._saver.wait()

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        if not self._saves_shards:
            return super()._save_checkpoint(model, trial)
        self._saver.wait()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._note_best(run_dir, folder)
        if self.args.should_save:
            files.discard(folder)  # of a run that went on from an earlier checkpoint
        files.gather(None)
        self._saver.save(
            folder,
            self.model,
            self.optimizer.optimizer,
            write_more=self._write_small_files,
            info=self._info(),
            then=lambda: self._rotate(run_dir),
        )

    def _write_small_files(self, folder: Path) -> None:
        """What Trainer keeps beside weights and optimizer, under its own names."""
        self._save_rng_state(str(folder))
        self._save_scaler(str(folder))
        if not self.args.should_save:
            return
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        self._save_without_weights(folder)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                stored = self.state.stateful_callbacks.get(name)
                if isinstance(stored, list):
                    stored.append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_without_weights(self, folder: Path) -> None:
        """Config, tokenizer and arguments, so that `from_pretrained(folder)` works."""
        if not getattr(self.model, "peft_config", None):
            name = type(self.model).__name__.removeprefix("FSDP")  # fully_shard puts it there
            self.model.config.architectures = [name]
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _info(self) -> dict:
        config = getattr(self.model.config, "distributed_config", None)
        layout = config.to_dict() if isinstance(config, DistributedConfig) else {}
        sizes = {k: v for k, v in layout.items() if k.endswith("_size") and v is not None}
        return {
            "step": self.state.global_step,
            "layout": sizes,
            "samples_per_step": self._samples_per_step(),
        }

    def _samples_per_step(self) -> int:
        """Sequences of one optimizer step, over all ranks; Trainer does not know of our sp_size."""
        config = getattr(self.model.config, "distributed_config", None)
        shared = getattr(config, "sp_size", None) or 1
        return self.get_total_train_batch_size(self.args) // shared

    def _note_best(self, run_dir: Path, folder: Path) -> None:
        step = self.state.best_global_step
        if self.args.save_strategy != SaveStrategy.NO and step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _rotate(self, run_dir: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if not self.args.should_save or not limit or limit < 0:
            return
        folders = sort_checkpoints(run_dir, use_mtime=True, best_model_checkpoint=best)
        protected = {folders[-1], str(Path(best)) if best else folders[-1]}
        kept = max(limit, len(protected & set(folders)))
        for folder in folders[: len(folders) - kept]:
            if folder not in protected:
                files.discard(Path(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        adapters = getattr(self.model, "peft_config", None)  # saved in PEFT's own format
        if not self.is_distributed_loading_by_transformers or adapters:
            return super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        export_model(self.model, folder)
        if self.args.should_save:
            self._save_without_weights(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        if not self._reads(folder):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        manifest = files.verify(folder)
        saved, now = manifest["samples_per_step"], self._samples_per_step()
        if saved != now and not self.args.ignore_data_skip:
            raise ValueError(
                f"{folder} was saved with {saved} samples per optimizer step and this run takes "
                f"{now}, so the place in the data would be lost; change "
                "per_device_train_batch_size or gradient_accumulation_steps, or start the data "
                "anew with ignore_data_skip"
            )
        model = self.model if model is None else model
        check_match(folder, model)
        load_model(folder, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._reads(Path(checkpoint)):
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder, optimizer = Path(checkpoint), self.optimizer.optimizer
        check_match(folder, self.model, optimizer)
        load_optimizer(folder, self.model, optimizer)
        load_scheduler(folder, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._reads(Path(checkpoint)):
            if files.read_manifest(Path(checkpoint))["world_size"] != self.args.world_size:
                return  # the states are of other ranks, with other shares of the data
        super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        if not self._reads(folder):
            return super()._load_best_model()
        self._saver.wait()
        files.verify(folder)
        load_model(folder, self.model)

    def _reads(self, folder: Path) -> bool:
        """Whether `folder` is ours to load: a sharded model has no other way."""
        return self.is_distributed_loading_by_transformers or files.is_checkpoint(folder)


def check_resumable(folder: str | os.PathLike) -> None:
    """Holds a folder that a sharded run shall resume from against its manifest, in milliseconds.

    Raises:
        ValueError: names the file that is missing, foreign or of another size.
    """
    files.read_manifest(Path(folder))
    path = Path(folder) / TRAINER_STATE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} was not saved by a Trainer")
    TrainerState.load_from_json(str(path))
