"""Where the YAML files of this package are."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the recipes: ["eight_gpus_ep_fsdp", ...]."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path(name: str) -> str:
    """The file of a recipe, or `name` itself where it is a file or no recipe's name."""
    file = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    return name if Path(name).is_file() or not file.is_file() else str(file)
