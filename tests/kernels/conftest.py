"""Kernel tests run on the GPU if there is one, else on PyTorch's CPU path.

With TRITON_INTERPRET=1 they run on Triton's interpreter. Every uninitialised tensor is filled with
NaN first, so that an element nobody wrote shows.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was
    torch.use_deterministic_algorithms(False)
