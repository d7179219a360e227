"""Moving tokens between ranks whose memory this GPU can read: pulls rows, and sums what comes back.

Shapes: n ranks, T tokens published by each, R = n*T rows here (row = rank*T + t), H hidden, K
experts a token. `peers` (n,) int64 holds the address of every rank's copy of one buffer, `offset`
the byte where an array starts in it. The caller orders publishing and pulling (barriers).
"""

from __future__ import annotations

import torch

from .backends.launch import launch, next_power_of_2


def write_routes(
    place: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tokens: int
) -> None:
    """Into `place` (tokens * 2K * 4 bytes): K global ids, then the bits of K fp32 weights, a token.

    Tokens past the last of ids and weights (T, K), T <= tokens, get ids of experts on no rank.
    """
    from .backends.triton.exchange import write_routes_kernel

    top_k, block = ids.shape[1], 256
    if tokens:
        launch(
            write_routes_kernel, (-(-tokens * top_k // block),),
            (place.view(torch.int32), ids.contiguous(), weights.contiguous()),
            (tokens * top_k, ids.numel()), (top_k, block),
        )  # fmt: skip


def pull_routes(
    peers: torch.Tensor, tokens: int, top_k: int, first: int, num_experts: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (R, K) int32, weights (R, K) of `dtype`) of every rank's tokens, seen from this rank.

    From what `write_routes` wrote. An id becomes a local one, id - first; that of another rank's
    expert becomes the sentinel num_experts with weight 0.
    """
    from .backends.triton.exchange import pull_routes_kernel

    shape = (peers.numel() * tokens, top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=peers.device)
    weights = torch.empty(shape, dtype=dtype, device=peers.device)
    if ids.numel():
        block = 256
        launch(
            pull_routes_kernel, (-(-ids.numel() // block),), (peers, ids, weights),
            (ids.numel(), tokens, first), (num_experts, top_k, block),
        )  # fmt: skip
    return ids, weights


def pull_rows(
    peers: torch.Tensor, ids: torch.Tensor, width: int, num_experts: int, dtype: torch.dtype
) -> torch.Tensor:
    """(R, H): the published rows (T, H) of every rank that have an expert here.

    `ids` (R, K) from `pull_routes`. Rows without a local expert are left unwritten: nothing crosses
    the link for them, and nothing may read them.
    """
    from .backends.triton.exchange import pull_rows_kernel

    rows = torch.empty(ids.shape[0], width, dtype=dtype, device=peers.device)
    if ids.shape[0]:
        tokens = ids.shape[0] // peers.numel()
        block_k, block_h = next_power_of_2(ids.shape[1]), min(4096, next_power_of_2(width))
        launch(
            pull_rows_kernel, (ids.shape[0],), (peers, ids, rows), (tokens,),
            (width, num_experts, ids.shape[1], block_k, block_h),
            num_warps=8 if block_h > 2048 else 4,
        )  # fmt: skip
    return rows


def pull_sums(
    peers: torch.Tensor, arrays: list[tuple[int, int, torch.dtype]], ids: torch.Tensor,
    tokens: int, rank: int, num_experts: int,
) -> list[torch.Tensor]:  # fmt: skip
    """(len(ids), W) each: a token's partial rows of all ranks that hold one of its experts, summed.

    In fp32 and in rank order. `arrays` are one or two (first byte, W, dtype) of (R, W) that every
    rank has published; this rank's tokens start at row rank * tokens. `ids` (len, K) are global,
    num_experts those of one rank.
    """
    from .backends.triton.exchange import pull_sums_kernel

    outs = [ids.new_empty(ids.shape[0], width, dtype=dtype) for _, width, dtype in arrays]
    if ids.shape[0]:
        (first, width, _), (second, small, _) = arrays[0], arrays[-1]
        block_k, block_h = next_power_of_2(ids.shape[1]), min(4096, next_power_of_2(width))
        launch(
            pull_sums_kernel, (ids.shape[0],), (peers, ids, outs[0], outs[-1]),
            (first, second, rank * tokens),
            (width, small, num_experts, ids.shape[1], peers.numel(), block_k, block_h,
             next_power_of_2(small) if len(arrays) > 1 else 0),
            num_warps=8 if block_h > 2048 else 4,
        )  # fmt: skip
    return outs
