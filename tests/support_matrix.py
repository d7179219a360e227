"""The README's table of supported model families, from running each of them as its tests do.

python -m tests.support_matrix                # print it
python -m tests.support_matrix README.md      # put it between the two marker comments there
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from torch import nn

from hf_moe_ep.experts import gate_of
from tests import families
from tests.families import Family, forward_backward, relative_errors, tiny_model

BEGIN, END = "<!-- support-matrix: begin -->", "<!-- support-matrix: end -->"
BOUND = 1e-5
NAMES = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU (tanh)", "relu": "ReGLU"}
UNGATED_NAMES = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "relu2": "squared ReLU"}


def weights_of(family: Family) -> str:
    """How the family stores its experts, in a few words."""
    up = "gate_up_proj" if family.has_gate else "up_proj"
    words = [f"`{up}` " + ("[E, in, out]" if family.is_transposed else "[E, out, in]")]
    words += ["interleaved"] * (not family.is_concatenated)
    words += ["biases"] * family.has_bias
    words += ["norm after each expert"] * family.has_post_expert_norm
    return ", ".join(words)


def gate_name(module: nn.Module) -> str:
    """The gate, and whether it is fused into the GEMMs or runs between them."""
    gate = gate_of(module)
    if gate is None:
        return "the model's own, as written"
    name = (NAMES if gate.gated else UNGATED_NAMES).get(gate.activation, gate.activation)
    name += " with (up + 1)" if gate.up_offset else ""
    name += ", clamped" if gate.limit != float("inf") else ""
    return name + ("" if module.has_post_expert_norm else ", fused")


def measure(family: Family) -> tuple[str, float]:
    """(gate, largest relative error of the output and all gradients) of the family's tiny model."""
    expected = forward_backward(tiny_model(family))
    model = tiny_model(family, "fastmoe")
    module = next(iter(families.experts_modules(model).values()))
    errors = relative_errors(forward_backward(model), expected)
    worst = max(errors.values())
    if not worst < BOUND:
        raise AssertionError(f"{family.name}: relative error {worst:.1e} is not below {BOUND:.0e}")
    return gate_name(module), worst


def rows() -> tuple[dict[tuple[str, str], list[str]], float]:
    """(weights, gate) -> families, and the largest error of all."""
    table, worst = defaultdict(list), 0.0
    for family in families.tested():
        gate, error = measure(family)
        name = family.name.removesuffix("TextExperts").replace("/Qwen3OmniMoe", " ").lower()
        table[weights_of(family), gate].append(name)
        worst = max(worst, error)
    return table, worst


def render() -> str:
    """The table in markdown, largest group first, with what it was measured by."""
    table, worst = rows()
    lines = ["| Experts' weights | Gate | Families |", "| --- | --- | --- |"]
    for (weights, gate), names in sorted(table.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {weights} | {gate} | {', '.join(names)} |")
    lines += [f"| | not tested | {name}: {why} |" for name, why in families.SKIPPED.items()]
    count, torch_version = sum(map(len, table.values())), torch.__version__.partition("+")[0]
    lines += [
        "",
        f"{count} experts classes behind the experts interface of transformers "
        f"{transformers.__version__}, each as a tiny model: output and every gradient against "
        f"`eager` in fp32 on CPU (torch {torch_version}). Largest relative error: {worst:.1e}.",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    text = render()
    if not arguments:
        print(text)
        return
    path = Path(arguments[0])
    before, _, rest = path.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}, in this order: add them")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
