"""`hf-moe-ep demo`: a small Qwen3-MoE trained with eager experts, then with fastmoe, compared."""

from .run import main

__all__ = ["main"]
