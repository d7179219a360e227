"""hf-moe-ep: `import hf_moe_ep` registers experts_implementation="fastmoe" with transformers.

Nothing is patched.
"""

from .versions import check_versions

check_versions()

from .registry import register  # noqa: E402 - an unsupported version must be named before its modules are imported

register()

__all__ = ["register"]
