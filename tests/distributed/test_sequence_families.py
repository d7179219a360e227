"""Sequence parallelism of every causal language model behind transformers' experts interface: its
gradients are those of one process, or it is refused; none is silently wrong.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests import families
from tests.distributed.ranks import run_ranks
from tests.distributed.test_megatron import load_megatron
from tests.distributed.test_ulysses import BOUND, Case, batch, load_ulysses, save_references
from tests.distributed.test_ulysses import worst_errors as all_worst_errors

NAMES = [
    family.name
    for family in families.tested()
    if families.model_class(family).__name__.endswith("ForCausalLM")
]
# What each raises, in its first forward at the latest.
ULYSSES = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4"), "indexer"),
    **dict.fromkeys(("bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear"), "mixes tokens"),
    **dict.fromkeys(("lfm2_moe", "minimax", "nemotron_h", "qwen3_5_moe"), "mixes tokens"),
    **dict.fromkeys(("qwen3_next", "qwen4_exp", "zaya", "inkling", "inkling2"), "mixes tokens"),
    **dict.fromkeys(("beam", "gemma4", "mistral4"), "must match the size"),
    "deepseek_v4": "position embeddings as dict",
}


MEGATRON = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa"), "indexer"),
    **dict.fromkeys(("deepseek_v4", "gemma4", "hy_v4"), "stands beside the layers"),
    **dict.fromkeys(("nemotron_h", "qwen4_exp"), "stands beside the layers"),
    **dict.fromkeys(("jamba", "lfm2_moe", "qwen3_5_moe", "qwen3_next"), "has no `self_attn`"),
    "granitemoehybrid": "match nothing",
    "inkling": "",  # an assertion of DTensor: its lm_head is row-wise
    "minimax": "must match the size",
}
WAYS = {
    # fp64 shows a wrong formula best; Ulysses runs on FSDP2, whose fp64 some families refuse.
    "ulysses": (partial(load_ulysses, 2, 1), torch.float32, ULYSSES),
    "megatron": (partial(load_megatron, 2, 2), torch.float64, MEGATRON),
}


def worst_errors(load, saved, cases: dict[str, Case]) -> dict:
    """Family -> its worst error, or the message of what it raised."""
    found = {}
    for folder, names in saved:
        try:
            found |= all_worst_errors(load, [(folder, names)], cases, 2)
        except (ValueError, RuntimeError, AssertionError) as error:
            found[names[0]] = str(error)
    return found


@pytest.mark.grid
@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("way", WAYS)
def test_every_family_is_right_or_refused(tmp_path, way, part):
    load, dtype, refused = WAYS[way]
    names = [n for n in NAMES[part::6] if (way, n) != ("megatron", "inkling2")]  # never in fp64
    eager = {"experts_implementation": "eager"}
    cases = {n: Case((batch(2, 13),), family=n, load=eager, dtype=dtype) for n in names}
    saved = save_references(tmp_path, cases)
    found = run_ranks(2, worst_errors, load, saved, cases, timeout=240)[0]
    for name, result in found.items():
        if name in refused:
            assert isinstance(result, str) and refused[name] in result, (name, result)
        else:
            assert not isinstance(result, str) and result[1] < BOUND, (name, result)
