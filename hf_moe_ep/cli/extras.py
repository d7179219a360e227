"""What a command needs beyond the core install, asked for before it starts."""

from ..versions import OPTIONAL, installed, version_problem


def require(extra: str, *packages: str) -> None:
    """Holds `packages`, which hf-moe-ep[extra] installs, against their supported versions.

    Raises:
        ImportError: names what is missing or out of range, and the command that installs it.
    """
    problems = []
    for package in packages:
        if package in OPTIONAL:
            problems += filter(None, [version_problem(package, OPTIONAL[package])])
        elif installed(package) is None:
            problems.append(f"{package} is not installed")
    if problems:
        raise ImportError(f"{'; '.join(problems)}: run `pip install 'hf-moe-ep[{extra}]'`")
