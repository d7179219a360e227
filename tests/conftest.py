"""What holds for every test: no network, one thread per process, the same seed, quiet libraries."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def fastmoe_calls(monkeypatch):
    """The modules that the registered "fastmoe" function was called with, in order."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import hf_moe_ep  # noqa: F401

    registered, modules = ALL_EXPERTS_FUNCTIONS["fastmoe"], []

    def recording(module, *args, **kwargs):
        modules.append(module)
        return registered(module, *args, **kwargs)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "fastmoe", recording)
    return modules
