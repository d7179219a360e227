"""Kernel tests run on the GPU if there is one, else on PyTorch's CPU path.

With TRITON_INTERPRET=1 they run on Triton's interpreter. Every uninitialised tensor is filled with
NaN first, so that an element nobody wrote shows.
"""

from types import SimpleNamespace

import pytest
import torch

from fastmoe.backends import launch as launching
from fastmoe.backends import replay as replaying


@pytest.fixture(autouse=True)
def poisoned():
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hooks(monkeypatch):
    """Triton's hooks on launches and whether it is known, and the driver that a CPU has not.

    Nothing is compiled or seen yet.
    """
    hooks = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]),
        known=True,
    )  # fmt: skip
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 0))
    monkeypatch.setattr(launching, "_triton", lambda: (hooks.known, driver, hooks))
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(replaying, "_replays", {})
    return hooks
