"""Names the namespace of the custom ops in a checkout and in the wheel, both of which bundle one.

The kernel builder generates this file with a namespace of its own for every build, and refuses a
source tree that has it: it is left out when the kernel is published (see CONTRIBUTING.md).
"""

import torch

ops = torch.ops.fastmoe


def add_op_namespace_prefix(op_name: str) -> str:
    return f"fastmoe::{op_name}"
