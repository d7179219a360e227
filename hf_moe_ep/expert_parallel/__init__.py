"""Expert parallelism: tokens travel once per rank to fastmoe experts, and once back."""

from .implementation import AutoEP, FastMoEEP
from .recompute import keep_routing

__all__ = ["AutoEP", "FastMoEEP", "keep_routing"]
