"""Layouts of one model: the rules its modules need, what a layout cannot do, and what it costs."""

from .checks import (
    Check,
    conflict_checks,
    experts_checks,
    model_checks,
    require,
    training_checks,
    world_checks,
)
from .defaults import default_layout
from .model import experts_modules, meta_model
from .rules import complete, ep_plan, replicate_plan, sp_plan, tp_plan
from .shards import local_shapes

__all__ = [
    "Check",
    "complete",
    "conflict_checks",
    "default_layout",
    "ep_plan",
    "experts_checks",
    "experts_modules",
    "local_shapes",
    "meta_model",
    "model_checks",
    "replicate_plan",
    "require",
    "sp_plan",
    "tp_plan",
    "training_checks",
    "world_checks",
]
