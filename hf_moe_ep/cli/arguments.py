"""TRL's SFTConfig for a model that is sharded by hf_moe_ep's DistributedConfig, and the choice of
what computes sdpa attention."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch.nn.attention import SDPBackend, sdpa_kernel
from trl import SFTConfig

from ..config import DistributedConfig
from ..training import adamw

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class SFTArguments(SFTConfig):
    """SFTConfig whose model_init_kwargs may hold a DistributedConfig, which JSON cannot write."""

    async_save: bool = field(
        default=False,
        metadata={"help": "Sharded models: write checkpoints while training goes on."},
    )

    sdpa_backend: str | None = field(
        default=None,
        metadata={
            "help": "What sdpa attention tries first, where it can serve the call: "
            f"{', '.join(SDPA_BACKENDS)}; default: torch's order."
        },
    )

    fast_adamw: bool = field(
        default=False,
        metadata={
            "help": "AdamW's steps and gradient clipping at the memory's bandwidth, instead of "
            "torch's: the same formula and state as --optim adamw_torch_fused."
        },
    )

    def __post_init__(self):
        if self.sdpa_backend not in (None, *SDPA_BACKENDS):
            raise ValueError(
                f"sdpa_backend={self.sdpa_backend!r}: choose from {', '.join(SDPA_BACKENDS)}"
            )
        super().__post_init__()
        if self.fast_adamw:
            adamw.check(self)

    def sdpa_order(self) -> AbstractContextManager:
        """While it lasts, torch's sdpa tries `sdpa_backend` first, in every thread."""
        if self.sdpa_backend is None:
            return nullcontext()
        first = SDPA_BACKENDS[self.sdpa_backend]
        others = [backend for backend in SDPA_BACKENDS.values() if backend != first]
        return sdpa_kernel([first, *others], set_priority=True)

    def to_dict(self):
        """As SFTConfig's, with the layout as a dict; loggers write it as JSON."""
        values = super().to_dict()
        init = values["model_init_kwargs"]
        if isinstance(init, dict) and isinstance(init.get("distributed_config"), DistributedConfig):
            layout = init["distributed_config"].to_dict()
            values["model_init_kwargs"] = init | {"distributed_config": layout}
        return values
