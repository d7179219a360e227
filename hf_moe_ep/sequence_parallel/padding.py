"""Decoder inputs padded to a multiple of the ranks that share a sequence, behind the last token.

Shapes: B batch, S tokens, N ranks.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def pad_inputs(args: tuple, kwargs: dict, n: int, name: str) -> tuple[dict, int]:
    """Keyword arguments of a decoder, padded to a multiple of `n` tokens, and S before padding.

    Padding is behind the last token, where no token of a causal model sees it; a packed row's last
    sequence grows by it. No cache is kept: `use_cache` is False in the result.

    Raises:
        ValueError: a cache (generation), or padding where the mask is not a 2D one. `name` says
            in it what `n` is.
    """
    kwargs = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
    if kwargs.get("past_key_values") is not None:
        raise ValueError(f"a model with {name}={n} cannot generate; load it without for that")
    kwargs["use_cache"] = False
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    length = (embeddings if ids is None else ids).shape[1]
    extra = -length % n
    if not extra:
        return kwargs, length
    if ids is not None:
        kwargs["input_ids"] = pad(ids, (0, extra))
    if embeddings is not None:
        kwargs["inputs_embeds"] = pad(embeddings, (0, 0, 0, extra))
    if (mask := kwargs.get("attention_mask")) is not None:
        if not torch.is_tensor(mask) or mask.ndim != 2:
            raise ValueError(
                f"{length} tokens are no multiple of {name}={n}, and the attention mask is not a "
                "2D tensor that can be padded; pad the batch to a multiple"
            )
        # Ones: no real token sees what comes after it, and a mask without zeros costs nothing.
        kwargs["attention_mask"] = pad(mask, (0, extra), value=1)
    if (positions := kwargs.get("position_ids")) is not None:
        more = torch.arange(1, extra + 1, device=positions.device)
        kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + more], -1)
    for side in ("q", "k"):  # a packed row, for flash attention
        if (ends := kwargs.get(f"cu_seq_lens_{side}")) is not None:
            kwargs[f"cu_seq_lens_{side}"] = torch.cat([ends[:-1], ends[-1:] + extra])
            kwargs[f"max_length_{side}"] += extra
    return kwargs, length
