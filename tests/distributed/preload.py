"""What the server that ranks are forked from does once, so that no rank has to."""

from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import hf_moe_ep  # noqa: F401

# Compiles the regular expressions of all families' checkpoints, 2.5 s of a process's first load.
get_checkpoint_conversion_mapping("qwen3_moe")
