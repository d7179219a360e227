"""What bounds an implementation from below on this machine: plain dense matmuls, and the bandwidth
of the memory.

Both are measured here and now, beside the implementations. S = T*K routed rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .problems import Inputs, Problem
from .timing import interleave

DENSE = "dense_limit"
STREAM_BYTES = 4 * 2**30  # far above every cache


def dense_gemms(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """The six GEMMs of a SwiGLU experts layer with the same FLOPs, one dense matmul each: two
    forward, four backward.
    """
    p, s = problem, problem.T * problem.K
    new = {"dtype": inputs.x.dtype, "device": inputs.x.device}
    x, dy = torch.randn(s, p.H, **new), torch.randn(s, p.H, **new)
    a, dh = torch.randn(s, p.I, **new), torch.randn(s, 2 * p.I, **new)
    up, down = torch.randn(2 * p.I, p.H, **new), torch.randn(p.H, p.I, **new)
    return {
        "up": lambda: x @ up.T,  # (S, 2I)
        "down": lambda: a @ down.T,  # (S, H)
        "down input gradient": lambda: dy @ down,  # (S, I)
        "up input gradient": lambda: dh @ up,  # (S, H)
        "down weight gradient": lambda: dy.T @ a,  # (H, I)
        "up weight gradient": lambda: dh.T @ x,  # (2I, H)
    }


def dense_limit(problem: Problem, inputs: Inputs) -> dict[str, Callable[[], None]]:
    """Those GEMMs one after another and nothing around them; keys as the quantities of the training
    benchmark.
    """
    gemms = list(dense_gemms(problem, inputs).values())

    def first(count: int) -> Callable[[], None]:
        def call() -> None:
            for gemm in gemms[:count]:
                gemm()

        return call

    return {"forward": first(2), "frozen_step": first(4), "step": first(6)}


def stream_bandwidth(
    device: torch.device, nbytes: int = STREAM_BYTES, seconds: float = 0.3
) -> float:
    """Bytes per second of the fastest of three streaming kernels over `nbytes`: copy, sum, and a
    matrix-vector product.

    The median of interleaved rounds. Copy moves half of `nbytes` there and back, so each kernel
    moves `nbytes`.
    """
    matrix = torch.zeros(nbytes // 2 // 4096, 4096, dtype=torch.bfloat16, device=device)
    vector = torch.zeros(4096, dtype=torch.bfloat16, device=device)
    half = matrix.shape[0] // 2
    as_float = matrix.view(torch.float32)
    calls = {
        "copy": lambda: matrix[:half].copy_(matrix[half : 2 * half]),
        "sum": as_float.sum,
        "matrix-vector": lambda: torch.mv(matrix, vector),
    }
    best_ms = min(s.median_ms for s in interleave(calls, device, seconds).values())
    return nbytes / best_ms * 1e3


def decode_bytes(problem: Problem, inputs: Inputs) -> tuple[int, int]:
    """Experts that any token goes to, and the bytes of their weights: the least that a decode step
    reads.
    """
    ids = torch.unique(inputs.top_k_index)
    active = int((ids < problem.E).sum())
    per_expert = 3 * problem.H * problem.I * inputs.up.element_size()
    return active, active * per_expert
