"""fastmoe: the experts of a Mixture-of-Experts layer as one differentiable operator.

Names in `__all__` are the API.
"""

from . import exchange, layers
from .combine import sum_rows
from .device import backend_name, matmul_precision
from .finite import first_not_finite
from .gates import Gate
from .grouped_gemm import kernel_backends
from .moe import fused_experts, route_experts
from .optim import adamw_, scale_, square_sum
from .reference import reference_experts
from .routing import Routing, route

__all__ = [
    "Gate",
    "Routing",
    "adamw_",
    "backend_name",
    "exchange",
    "first_not_finite",
    "fused_experts",
    "kernel_backends",
    "layers",
    "matmul_precision",
    "reference_experts",
    "route",
    "route_experts",
    "scale_",
    "square_sum",
    "sum_rows",
]
