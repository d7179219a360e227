"""A checkpoint folder as a whole: there or not there, with a manifest of sizes and checksums.

It is written as `.NAME.incomplete` beside its place, fsynced, and renamed. What is deleted is
renamed first. All ranks see the same file system. Collectives move small Python objects only.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import torch.distributed as dist

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 1 << 24  # bytes read at a time


def rank_and_world() -> tuple[int, int]:
    """Rank and number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value, group=None) -> list:
    """What every rank passed, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def raise_together(problems: list[str], group=None) -> None:
    """Raises on every rank when one has a problem, so that none is left waiting in a collective.

    Raises:
        ValueError: the problems of all ranks, the first five.
    """
    found = list(dict.fromkeys(p for rank in gather(problems, group) for p in rank))
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError("; ".join(found[:5]) + more)


def start(folder: Path, group=None) -> Path:
    """The empty folder to write into; what an interrupted save of the same name left is removed."""
    incomplete = _hidden(folder, "incomplete")
    problems = []
    if rank_and_world()[0] == 0:
        try:
            discard(incomplete)
            incomplete.mkdir(parents=True)
        except OSError as error:
            problems.append(f"{incomplete}: {error}")
    raise_together(problems, group)
    return incomplete


def finish(incomplete: Path, folder: Path, info: dict, group=None) -> None:
    """Checksums and fsyncs what all ranks wrote into `incomplete`, and renames it to `folder`.

    info: JSON values for the manifest; read by nobody here.
    """
    rank, world = rank_and_world()
    gather(None, group)  # all have written
    names = _files(incomplete)[rank::world]
    problems, entries = [], {}
    try:
        entries = {name: _describe(incomplete / name, sync=True) for name in names}
    except OSError as error:
        problems.append(str(error))
    raise_together(problems, group)
    parts = gather(entries, group)
    if rank == 0:
        files = {name: entry for part in parts for name, entry in sorted(part.items())}
        manifest = {"format": FORMAT, "world_size": world, **info, "files": files}
        try:
            _write_synced(incomplete / MANIFEST, json.dumps(manifest, indent=1))
            for inner in [p for p in incomplete.rglob("*") if p.is_dir()] + [incomplete]:
                _sync_folder(inner)
            os.rename(incomplete, folder)
            _sync_folder(folder.parent)
        except OSError as error:
            problems.append(str(error))
    raise_together(problems, group)  # and nobody goes on before it is there


def discard(folder: Path) -> None:
    """Deletes `folder`, if it exists, without ever leaving half of it under its name."""
    doomed = _hidden(folder, "discarded")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def discard_leftovers(parent: Path) -> None:
    """Deletes what killed processes left of checkpoints in `parent`."""
    for end in ("incomplete", "discarded"):
        for leftover in parent.glob(f".checkpoint-*.{end}"):
            shutil.rmtree(leftover)


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether this package wrote `folder`."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint whose files are all there in full; contents are not read.

    Raises:
        ValueError: names the file that is missing, foreign or of another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: {folder} is not a checkpoint of a sharded run; for a folder "
            "of plain weights, load the model from there and start a new run"
        )
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"{path}: format {manifest['format']}, and this version reads {FORMAT}"
            )
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{path}: not the manifest of a checkpoint, or damaged") from None
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, and was saved with {size}")
    return manifest


def verify(folder: Path, group=None) -> dict:
    """The manifest, once every file has been read and has its checksum; ranks share the reading.

    Raises:
        ValueError: on every rank; names the files that are missing, foreign or damaged.
    """
    rank, world = rank_and_world()
    problems, manifest = [], {}
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        problems.append(str(error))
    raise_together(problems, group)
    for name in list(manifest["files"])[rank::world]:
        if _describe(folder / name)["crc32"] != manifest["files"][name]["crc32"]:
            problems.append(f"{folder / name} is damaged: its checksum is not the saved one")
    raise_together(problems, group)
    return manifest


def _hidden(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}.{end}")


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _describe(path: Path, sync: bool = False) -> dict:
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
