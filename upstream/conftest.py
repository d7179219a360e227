"""A reproduction that passes has nothing left to show: it is reported as skipped, "fixed"."""

import os
from importlib.metadata import version

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
PACKAGES = ("torch", "transformers", "accelerate", "trl")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.passed:
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"Skipped: fixed in {versions}")
    return report
