"""Ready settings for `hf-moe-ep sft --config NAME`, and one for inference."""

from .find import names, path

__all__ = ["names", "path"]
