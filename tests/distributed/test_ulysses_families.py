"""Ulysses over every causal language model behind transformers' experts interface: its gradients
are those of one process, or it is refused; none is silently wrong.
"""

from __future__ import annotations

from functools import partial

import pytest

from tests import families
from tests.distributed.ranks import run_ranks
from tests.distributed.test_ulysses import BOUND, Case, batch, load_ulysses, save_references
from tests.distributed.test_ulysses import worst_errors as all_worst_errors

NAMES = [
    family.name
    for family in families.tested()
    if families.model_class(family).__name__.endswith("ForCausalLM")
]
# What each raises, in its first forward at the latest.
REFUSED = {
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4"), "indexer"),
    **dict.fromkeys(("bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear"), "mixes tokens"),
    **dict.fromkeys(("lfm2_moe", "minimax", "nemotron_h", "qwen3_5_moe"), "mixes tokens"),
    **dict.fromkeys(("qwen3_next", "qwen4_exp", "zaya"), "mixes tokens"),
    **dict.fromkeys(("inkling", "inkling2"), "position_bias"),
    **dict.fromkeys(("beam", "gemma4", "mistral4"), "must match the size"),
    "deepseek_v4": "position embeddings as dict",
}


def worst_errors(saved, cases: dict[str, Case]) -> dict:
    """Family -> its worst error, or the message of what it raised."""
    found = {}
    for folder, names in saved:
        try:
            load = partial(load_ulysses, 2, 1)
            found |= all_worst_errors(load, [(folder, names)], cases, 2)
        except (ValueError, RuntimeError) as error:
            found[names[0]] = str(error)
    return found


@pytest.mark.grid
@pytest.mark.parametrize("part", range(6))
def test_every_family_is_right_or_refused(tmp_path, part):
    load = {"experts_implementation": "eager"}
    cases = {name: Case((batch(2, 13),), family=name, load=load) for name in NAMES[part::6]}
    saved = save_references(tmp_path, cases)
    found = run_ranks(2, worst_errors, saved, cases, timeout=240)[0]
    for name, result in found.items():
        if name in REFUSED:
            assert isinstance(result, str) and REFUSED[name] in result, (name, result)
        else:
            assert not isinstance(result, str) and result[1] < BOUND, (name, result)
