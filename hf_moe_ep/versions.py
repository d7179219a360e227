"""Which versions of other packages this release supports, and the check that runs at import.

pyproject.toml declares the same ranges and a test holds the two together. They stand here too
because a checkout on PYTHONPATH has no package metadata to read them from.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

__version__ = "0.1.0"

PYTHON = ">=3.11"
REQUIRED = {"torch": ">=2.8", "transformers": ">=5.23,<5.24", "accelerate": ">=1.15,<2"}
OPTIONAL = {"trl": ">=1.16,<1.17", "kernels": ">=0.17"}


def installed(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def version_problem(package: str, supported: str) -> str | None:
    """A sentence on what is wrong with the installed `package`, or None where it is in range."""
    found = installed(package)
    if found is None:
        return f"{package} is not installed; install `{package}{supported}`"
    if not SpecifierSet(supported).contains(found, prereleases=True):
        return f"{package} {found} is not supported; install `{package}{supported}`"
    return None


def check_versions(packages: dict[str, str] = REQUIRED) -> None:
    """Holds the installed `packages` against their ranges ({name: specifier}).

    Raises:
        ImportError: names every package that is missing or out of range, and the range.
    """
    problems = [p for name, spec in packages.items() if (p := version_problem(name, spec))]
    if problems:
        raise ImportError(f"hf-moe-ep {__version__}: " + "; ".join(problems))
