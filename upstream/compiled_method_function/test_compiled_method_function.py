"""getattr with a default, and hasattr, of a bound method's __func__ under torch.compile."""

import torch


class Experts(torch.nn.Module):
    def gate(self, x):
        return x


def functions(module, x):
    """What a module's code may ask of a bound method, as numbers in the result."""
    found = getattr(module.gate, "__func__", None) is Experts.gate
    return x + float(found) + 2 * float(hasattr(module.gate, "__self__"))


def test_compiled_method_function():
    x = torch.zeros(())
    compiled = torch.compile(functions, backend="eager", fullgraph=True)
    eager, found = functions(Experts(), x).item(), compiled(Experts(), x).item()
    assert found == eager, f"1 for its __func__ and 2 for its __self__: {found} instead of {eager}"
