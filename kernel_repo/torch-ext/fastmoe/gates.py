"""The activations between an expert's two projections that the kernels fuse.

Also their plain PyTorch form.

Shapes: h (S, U) is the up projection, U = 2I gated (gate and up halves, or interleaved pairs) or I
ungated; a (S, I).
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import lru_cache

import torch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Gate:
    """How the up projection h becomes the activation a that enters the down projection.

    Gated:   ``a = act(min(g, limit)) * (clip(u, -limit, limit) + up_offset)``,
             (g, u) the two parts of h.
    Ungated: ``a = act(h)``; limit and up_offset must keep their defaults.
    ``act`` is x * sigmoid(alpha * x) for "silu" (alpha 1 is SiLU, 1.702 gpt-oss's gate), the exact
    GELU for "gelu", its tanh form for "gelu_tanh", max(x, 0) for "relu" and its square for "relu2".

    Example: ``Gate()`` is SwiGLU, and
    ``Gate("silu", interleaved=True, alpha=1.702, limit=7.0, up_offset=1.0)`` is gpt-oss.

    Raises:
        ValueError: an unknown activation, or options that the activation has no use for.
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False  # h is g0 u0 g1 u1 ... instead of g0 g1 ... u0 u1 ...
    alpha: float = 1.0
    limit: float = math.inf
    up_offset: float = 0.0

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}; "
                "pass the gate as a function of the up projection instead"
            )
        if self.alpha != 1.0 and self.activation != "silu":
            raise ValueError(
                f"alpha={self.alpha} only applies to 'silu', not to {self.activation!r}"
            )
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} must be positive; leave it out for no limit")
        if not self.gated and (self.interleaved or self.up_offset != 0.0 or self.limit != math.inf):
            raise ValueError("an ungated activation has no interleaved layout, limit or up_offset")

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """a (S, I) from h (S, U), differentiable, in the dtype of h, computed in at least fp32."""
        x = h.to(compute_dtype(h.dtype))
        if not self.gated:
            return _act(self, x)[0].to(h.dtype)
        g, u = self.split(x)
        g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        return (_act(self, g)[0] * (u + self.up_offset)).to(h.dtype)

    def backward(self, h: torch.Tensor, grad_a: torch.Tensor) -> torch.Tensor:
        """The gradient of h (S, U) in the dtype of h, from that of a (S, I) in any float dtype."""
        x, d = h.to(compute_dtype(h.dtype)), grad_a.to(compute_dtype(h.dtype))
        if not self.gated:
            return (d * _act(self, x)[1]).to(h.dtype)
        g, u = self.split(x)
        value, slope = _act(self, g.clamp(max=self.limit))
        grad_g = d * (u.clamp(-self.limit, self.limit) + self.up_offset) * slope * (g <= self.limit)
        grad_u = d * value * (u.abs() <= self.limit)
        if self.interleaved:
            return torch.stack((grad_g, grad_u), dim=-1).flatten(-2).to(h.dtype)
        return torch.cat((grad_g, grad_u), dim=-1).to(h.dtype)

    def split(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate and up parts of h (S, 2I), views of (S, I) each."""
        return (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)

    @lru_cache(maxsize=64)  # noqa: B019 - gates are few, small and hashable
    def spec(self) -> str:
        """One string that `from_spec` turns back into this gate.

        It is what crosses the custom-op boundary.
        """
        return ",".join(map(str, astuple(self)))

    @staticmethod
    @lru_cache(maxsize=64)
    def from_spec(spec: str) -> Gate:
        activation, gated, interleaved, *numbers = spec.split(",")
        return Gate(activation, gated == "True", interleaved == "True", *map(float, numbers))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit dtypes, the dtype itself for fp32 and fp64."""
    return torch.promote_types(dtype, torch.float32)


def _act(gate: Gate, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and its derivative at x."""
    if gate.activation == "silu":
        s = torch.sigmoid(gate.alpha * x)
        return x * s, s * (1 + gate.alpha * x * (1 - s))
    if gate.activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if gate.activation == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 0.134145 * x * x)
    r = x.clamp(min=0)
    if gate.activation == "relu":
        return r, (x > 0).to(x.dtype)
    return r * r, 2 * r
