"""`hf-moe-ep bench`: the experts benchmark on this machine. Its code is benchmarks/, which
hf_moe_ep links to.
"""

from __future__ import annotations

from ..benchmarks.bench_experts import main

__all__ = ["main"]
