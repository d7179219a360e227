"""TRL's SFTConfig for a model that is sharded by hf_moe_ep's DistributedConfig."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..config import DistributedConfig


@dataclass
class SFTArguments(SFTConfig):
    """SFTConfig whose model_init_kwargs may hold a DistributedConfig, which JSON cannot write."""

    async_save: bool = field(
        default=False,
        metadata={"help": "Sharded models: write checkpoints while training goes on."},
    )

    def to_dict(self):
        """As SFTConfig's, with the layout as a dict; loggers write it as JSON."""
        values = super().to_dict()
        init = values["model_init_kwargs"]
        if isinstance(init, dict) and isinstance(init.get("distributed_config"), DistributedConfig):
            layout = init["distributed_config"].to_dict()
            values["model_init_kwargs"] = init | {"distributed_config": layout}
        return values
