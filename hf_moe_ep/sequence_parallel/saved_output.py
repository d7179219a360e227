"""The output of Ulysses attention is kept for backward once, not in both of its layouts.

A backend keeps its output for its own backward, (B, S, h / N, dv): all tokens, this rank's heads.
The output projection behind the exchange keeps (B, s, h, dv): this rank's tokens, all heads; the
same bytes again. Here the first is let go after forward, and exchanged back out of the second when
backward asks for it: one all-to-all more, 2 * B * s * h * dv bytes less in every layer. (A frozen
projection keeps nothing: then it is the second that stays, and no byte is won.)

Shapes as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved:
    """What autograd holds in place of a tensor that the backend saved."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        self.version = tensor._version  # autograd compares none for what hooks have packed
        self.again: Callable[[], Tensor] | None = None


def exchange_output(
    attend: Callable[[], Tensor],
    to_tokens: Callable[[Tensor], Tensor],
    to_heads: Callable[[Tensor], Tensor],
) -> Tensor:
    """`to_tokens(attend())`, (B, s, h, dv); `attend` gives (B, S, h / N, dv).

    `to_heads` is the inverse of `to_tokens`. Both tensors stay kept where someone else decides
    what is kept (checkpointing, offloading), while compiling, and when the backend saved something
    else than the memory of what it returned.
    """
    saved: list[_Saved] = []

    def pack(tensor: Tensor) -> _Saved:
        saved.append(_Saved(tensor))
        return saved[-1]

    with saved_tensors_hooks(pack, _unpack) if _ours_to_keep() else nullcontext():
        output = attend()
    exchanged = to_tokens(output)
    for entry in saved:
        if _same_memory(entry.tensor, output):
            _let_go(entry, exchanged.detach(), to_heads)
    return exchanged


def _ours_to_keep() -> bool:
    """Whether no other hooks are at work; only the innermost ones are called."""
    innermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return not torch.compiler.is_compiling() and innermost is not None and innermost(True) is None


def _same_memory(tensor: Tensor, output: Tensor) -> bool:
    storage = output.untyped_storage()
    return (
        output.is_contiguous()
        and storage.nbytes() == output.numel() * output.element_size()
        and tensor.dtype == output.dtype
        and tensor.untyped_storage().data_ptr() == storage.data_ptr()
    )


def _let_go(entry: _Saved, exchanged: Tensor, to_heads: Callable[[Tensor], Tensor]) -> None:
    layout = entry.tensor.size(), entry.tensor.stride(), entry.tensor.storage_offset()
    version = exchanged._version

    def again() -> Tensor:
        _refuse_changes(exchanged, version)
        return to_heads(exchanged).as_strided(*layout)

    entry.tensor, entry.again = None, again


def _unpack(entry: _Saved) -> Tensor:
    if entry.again is not None:
        return entry.again()
    _refuse_changes(entry.tensor, entry.version)
    return entry.tensor


def _refuse_changes(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor {tuple(tensor.shape)} that attention needs for its backward, an input or "
            "its output, was changed in place: use an operation that makes a new tensor"
        )
