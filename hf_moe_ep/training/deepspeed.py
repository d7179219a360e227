"""DeepSpeed's AutoEP, which fastmoe cannot run inside; why is in upstream/deepspeed-autoep.md."""

from __future__ import annotations

import json
from pathlib import Path


def refuse_autoep(deepspeed: str | dict | None) -> None:
    """Refuses a DeepSpeed config that switches AutoEP on.

    AutoEP (DeepSpeed 0.19.8) replaces every MoE block by a layer of its own when the engine is
    made, so `experts_implementation` would be ignored without a word.

    deepspeed: `TrainingArguments.deepspeed`, a dictionary or the path of a JSON file, or None.

    Raises:
        ValueError: names the section, and the expert parallelism that works.
    """
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"deepspeed={deepspeed}: cannot be read as JSON: {error}") from error
    section = (deepspeed or {}).get("expert_parallel") or {}
    if section.get("enabled"):
        raise ValueError(
            f"the DeepSpeed config has expert_parallel={section}: AutoEP replaces the MoE blocks "
            "and ignores experts_implementation; drop that section and --deepspeed, and use FSDP2 "
            "with expert parallelism: DistributedConfig(fsdp_size=N, ep_size=N), on the command "
            "line --fsdp_size N --ep_size N"
        )
