"""How many tokens a batch holds, and how many keys each of them sees; summed on the device.

A token is a position the model works on that is not padding. B rows, L positions, N = B * L. Packed
rows hold several documents; a query sees keys of its own document only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .flops import AttentionTerm


@dataclass(frozen=True)
class Documents:
    """What the tokens of one batch are. Example: one row that packs 3 and 2 tokens, and one pad."""

    real: torch.Tensor  # (B, L) bool, False on padding: [[1, 1, 1, 1, 1, 0]]
    index: torch.Tensor  # (B, L) int64, 1-based place in the document: [[1, 2, 3, 1, 2, 0]]
    length: torch.Tensor  # (B, L) int64, tokens of the document: [[3, 3, 3, 2, 2, 0]]


def documents(inputs: dict) -> Documents:
    """Read a model's keyword arguments: input_ids (B, L) or inputs_embeds (B, L, H).

    Padding: attention_mask (B, L) is 0. Without a mask (packing, padding-free), a document of a
    single token whose label is -100 is padding: collators pad such rows with position 0, and a
    document's first token is never a target. Documents: a new one starts where position_ids (B, L)
    do not continue; without them (or with multi-axis ones) a row is one document. Raises ValueError
    where neither ids nor embeddings are given.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError(f"no input_ids and no inputs_embeds to count tokens in: {sorted(inputs)}")
    shape, device = tokens.shape[:2], tokens.device
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    starts[:, 0] = True
    if positions is not None and positions.ndim == 2:
        starts[:, 1:] |= positions[:, 1:] != positions[:, :-1] + 1
    if torch.is_tensor(mask) and mask.ndim == 2:
        real = mask[:, -shape[1] :] != 0
    else:
        real = torch.ones(shape, dtype=torch.bool, device=device)
        labels = inputs.get("labels")
        if positions is not None and labels is not None and labels.shape == shape:
            _, length = _within(starts, real)
            real = (length > 1) | (labels != -100)
    index, length = _within(starts, real)
    return Documents(real, index * real, length * real)


def _within(starts: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1-based index in, and length of, the document of every position; only real ones count."""
    seen = real.long().cumsum(1)  # (B, L)
    before = torch.where(starts, seen - real.long(), 0).cummax(1).values
    document = starts.flatten().cumsum(0) - 1  # (N,)
    lengths = torch.zeros_like(document).scatter_add_(0, document, real.flatten().long())
    return seen - before, lengths[document].view_as(seen)


class TokenCounter:
    """Running sums on the device: tokens, then per attention term the keys in both conventions."""

    def __init__(self, terms: tuple[AttentionTerm, ...], device: torch.device):
        self.terms = terms
        self.sums = torch.zeros(1 + 2 * len(terms), dtype=torch.int64, device=device)

    def add(self, inputs: dict) -> None:
        """Add one batch; launches device work and does not wait for it."""
        docs = documents(inputs)
        sums = [docs.real.sum()]
        for term in self.terms:
            full = _limited(docs.length, term)
            causal = _limited(docs.index, term) if term.causal else full
            sums += [full.sum(), causal.sum()]
        self.sums += torch.stack(sums).to(self.sums.device)


def _limited(keys: torch.Tensor, term: AttentionTerm) -> torch.Tensor:
    keys = keys // term.stride
    return keys if term.limit is None else keys.clamp(max=term.limit)
