"""hf-moe-ep: `import hf_moe_ep` registers experts_implementation="fastmoe" with transformers.

Nothing is patched.
"""

from .versions import check_versions

check_versions()

from .registry import register  # noqa: E402 - an unsupported version must be named before its modules are imported

register()

__all__ = ["DistributedConfig", "register"]


def __getattr__(name: str):
    if name == "DistributedConfig":
        from .config import DistributedConfig

        return DistributedConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
