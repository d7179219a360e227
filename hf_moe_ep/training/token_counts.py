"""Token counts of Trainer where several ranks are fed the same batch."""

from __future__ import annotations

from transformers import TrainerCallback

from .telemetry import batch_replicas


class TokenCountCallback(TrainerCallback):
    """Corrects `num_input_tokens_seen` (TrainingArguments.include_num_input_tokens_seen).

    Trainer (5.23) sums it over all ranks, so a batch that tp_size or sp_size ranks share counts
    that many times. `Trainer(..., callbacks=[TokenCountCallback()])`; right in the logs, in
    checkpoints and, for those written with it, after resuming.
    """

    def __init__(self):
        self._replicas, self._seen = 1, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._replicas = batch_replicas(model)
        self._seen = state.num_input_tokens_seen

    def on_substep_end(self, args, state, control, **kwargs):
        self._correct(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._correct(state)

    def _correct(self, state) -> None:
        added = state.num_input_tokens_seen - self._seen
        self._seen = state.num_input_tokens_seen = self._seen + added // self._replicas
