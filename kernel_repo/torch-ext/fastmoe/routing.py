"""Which row of the expert-sorted order each (token, k) slot goes to.

Built once per layer, reused by backward.

Shapes: T tokens, K slots a token, S = T*K slots, E experts. slot = t*K + k; rows are slots sorted
by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .backends import torch_ops


class Routing(NamedTuple):
    """The expert-sorted order of the slots, int32 throughout, on the device of the ids.

    Example: ids [[1, 0], [1, 2]] with E = 3 (slots 0..3 hold experts 1 0 1 2) sort to slots
    1 | 0 2 | 3, so perm = [1, 0, 2, 3], inv_perm = [1, 0, 2, 3], offsets = [0, 1, 3, 4].
    With E = 2, slot 3 is a sentinel: offsets = [0, 1, 3], inv_perm = [1, 0, 2, -1], and row 3
    belongs to nobody.
    """

    perm: torch.Tensor  # (S,) row -> slot; undefined at rows >= offsets[-1]. [1, 0, 2, 3]
    inv_perm: torch.Tensor  # (S,) slot -> row; -1 for a sentinel. [1, 0, 2, -1]
    offsets: torch.Tensor  # (E+1,) first row of each expert, then the number of rows. [0, 1, 3]
    # (M, 2) expert and first row of each tile of block_m rows; Triton only. [[0, 0], [1, 1]]
    tiles: torch.Tensor
    num_tiles: torch.Tensor  # (1,) how many rows of `tiles` are in use; Triton only. [2]
    block_m: int  # rows of a tile; 0 where no tile map is built. 16
    top_k: int  # K. 2

    @property
    def num_experts(self) -> int:
        return self.offsets.numel() - 1

    def cut(self, num_rows: int) -> Routing:
        """The same with num_rows = offsets[-1] rows, the sentinels' left out.

        Buffers by row then hold what is in use; fewer rows than that would be memory corruption.
        """
        return self._replace(perm=self.perm[:num_rows])

    def tensors(self) -> list[torch.Tensor]:
        return list(self[:5])


def route(top_k_index: torch.Tensor, num_experts: int, block_m: int = 0) -> Routing:
    """Sort the slots of `top_k_index` (T, K; int32 or int64) by expert, ties in slot order.

    There is no host sync. Ids outside [0, num_experts) are sentinels: they get no row.
    `block_m` > 0 also builds the tile map that the Triton kernels walk. A counting sort on GPUs
    (two launches, one for few slots), `torch.sort` elsewhere.
    """
    ids = top_k_index.reshape(-1)
    if block_m and ids.numel():
        from .backends.triton.routing import route_slots

        parts = route_slots(ids, num_experts, block_m, max_tiles(ids.numel(), num_experts, block_m))
    else:
        parts = torch_ops.route_slots(ids, num_experts)
    return Routing(*parts, block_m=block_m, top_k=top_k_index.shape[1])


def max_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Upper bound on the tiles of block_m rows.

    Every full one, and one partial tile for each expert in use.
    """
    return num_slots // block_m + min(num_experts, num_slots)
