"""Which layout to take where the user only says what for: inference (tp, ep) or training (sp, ep,
fsdp). `hf-moe-ep plan` compares more of them, and estimates their memory."""

from __future__ import annotations

import math
import os

from transformers import PreTrainedModel

from .checks import head_checks
from .model import experts_modules

FIRST_CHOICE = ("tp_size", "fsdp_size", "dp_replicate_size", "ep_size")


def default_layout(
    model: PreTrainedModel,
    purpose: str,
    world_size: int | None,
    gpus_per_node: int,
    given: dict,
) -> dict:
    """`given` with the sizes it leaves open, for `world_size` processes (None: WORLD_SIZE, or 1).

    Inference: tp over all ranks, dense modules replicated if heads do not divide; ep over the same
    ranks. Training: fsdp over all ranks, ep over as many of a node as the experts divide by.

    Raises:
        ValueError: another purpose.
    """
    if purpose not in ("training", "inference"):
        raise ValueError(f"purpose={purpose!r}: choose 'training' or 'inference'")
    world = world_size or int(os.environ.get("WORLD_SIZE", 1))
    given = dict(given)
    replicas = given.get("dp_replicate_size") or 1
    if purpose == "inference":
        tp = given.setdefault(
            "tp_size", max(1, world // (replicas * (given.get("fsdp_size") or 1)))
        )
        splits = all(c.status == "ok" for c in head_checks(model, {"tp_size": tp}))
        if tp > 1 and not (splits and model.tp_plan):
            given.setdefault("tp_plan", {})
    tp = given.get("tp_size") or 1
    fsdp = given.setdefault("fsdp_size", max(1, world // (replicas * tp)))
    experts = math.gcd(*(m.num_experts for m in experts_modules(model).values()))
    most = fsdp * tp if purpose == "inference" else min(fsdp * tp, max(tp, gpus_per_node))
    fits = [n for n in range(tp, most + 1, tp) if experts % n == 0 and fsdp * tp % n == 0]
    given.setdefault("ep_size", max(fits, default=1))
    return given
