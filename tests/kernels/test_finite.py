"""Which tensor is the first with a value that is not finite: of every dtype, size and alignment."""

import math

import pytest
import torch

from fastmoe.finite import WORDS, first_not_finite
from tests.kernels.common import DEVICE

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def tensors():
    """Sizes of several programs and of one, shapes that share no launch, a view, two dims."""
    torch.manual_seed(0)
    made = [torch.randn(n) for n in (2 * WORDS + 64, 8, 7, 1, 4096)]
    made += [torch.randn(33, 16).t(), torch.randn(40)[1:33], torch.randn(8, 24)]
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite(dtype):
    largest = torch.finfo(dtype).max
    made = [t.to(DEVICE, dtype) for t in tensors()]
    made += [torch.tensor([largest, -largest, 0.0, -0.0] * 4, device=DEVICE, dtype=dtype)]
    made += [torch.full((16,), torch.finfo(dtype).tiny / 4, device=DEVICE, dtype=dtype)]
    assert first_not_finite(made).item() == len(made)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_tensor_is_found_wherever_the_value_is(dtype, value):
    for n, like in enumerate(tensors()):
        for at in {0, like.numel() - 1}:
            made = [t.to(DEVICE, dtype) for t in tensors()]
            row, column = divmod(at, like.shape[-1])
            (made[n] if like.ndim == 1 else made[n][row])[column] = value
            assert first_not_finite(made).item() == n, (n, at)


def test_the_first_of_several_and_of_mixed_dtypes():
    made = [t.to(DEVICE, d) for t, d in zip(tensors(), DTYPES * 2, strict=True)]
    for spoilt, first in ((6, 6), (3, 3), (4, 3), (2, 2)):
        made[spoilt].view(-1)[0] = math.nan
        assert first_not_finite(made).item() == first
