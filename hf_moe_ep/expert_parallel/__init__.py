"""Expert parallelism: tokens travel once per rank to fastmoe experts, and once back."""

from .implementation import AutoEP, FastMoEEP

__all__ = ["AutoEP", "FastMoEEP"]
