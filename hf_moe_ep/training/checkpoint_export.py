"""The hub's safetensors files from a sharded model or from a checkpoint of any layout.

No rank ever holds the model: each writes some of the files, layer by layer, from shards on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from . import checkpoint_files as files
from .checkpoint import CheckpointSaver

LAYER = re.compile(r"(.*?\.\d+)\.")


def export_model(
    model: PreTrainedModel, folder: str | os.PathLike, max_shard_size: int = 5 * 10**9
) -> None:
    """Writes `model`'s weights to `folder` as `save_pretrained` would, in its names. Collective.

    Writes every rank's shards to `folder/.shards` first, so it takes twice the space meanwhile;
    host memory: one file, at most max_shard_size bytes or one layer, whichever is more.
    """
    folder = Path(folder)
    shards = folder / ".shards"
    if files.rank_and_world()[0] == 0:
        files.discard(shards)
    files.gather(None)
    CheckpointSaver().save(shards, model)
    export_checkpoint(shards, model, folder, max_shard_size)
    files.gather(None)
    if files.rank_and_world()[0] == 0:
        shutil.rmtree(shards)


def export_checkpoint(
    checkpoint: str | os.PathLike,
    model: PreTrainedModel,
    folder: str | os.PathLike,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes the weights in `checkpoint` to `folder` as `save_pretrained` would.

    model: of the same architecture, for its names alone: it may be on the meta device. Works in one
        process, and is shared out where a process group has several. max_shard_size: bytes.

    Raises:
        ValueError: on every rank, before anything is written: a file is missing or damaged.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    files.verify(checkpoint)
    rank, world = files.rank_and_world()
    plan = _plan(checkpoint, model, max_shard_size)
    _remove_weights(folder, rank)
    weight_map, size = {}, 0
    for number in range(rank, len(plan), world):
        name = "model.safetensors"
        if len(plan) > 1:
            name = f"model-{number + 1:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for group in plan[number]:
            tensors |= revert_weight_conversion(model, _read(checkpoint, group))
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(t.nbytes for t in tensors.values())
    parts = files.gather((weight_map, size))
    if rank == 0 and len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(size for _, size in parts)},
            "weight_map": dict(sorted(i for names, _ in parts for i in names.items())),
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")


def _plan(checkpoint: Path, model: PreTrainedModel, max_shard_size: int) -> list[list[dict]]:
    """Files, each a list of groups {name: (shape, dtype)} that are converted together: layers."""
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    ignored = model._keys_to_ignore_on_save or ()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, dict] = {}
    for name, entry in metadata.items():
        if name in ignored or tied.get(name) in metadata:
            continue
        layer = LAYER.match(name)
        group = groups.setdefault(layer.group(1) if layer else "", {})
        group[name] = (tuple(entry.size), entry.properties.dtype)
    plan, filled = [[]], 0
    for group in groups.values():
        size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in group.values())
        if plan[-1] and filled + size > max_shard_size:
            plan.append([])
            filled = 0
        plan[-1].append(group)
        filled += size
    return plan


def _read(checkpoint: Path, group: dict) -> dict[str, torch.Tensor]:
    state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in group.items()}
    reader = HuggingFaceStorageReader(str(checkpoint))
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _remove_weights(folder: Path, rank: int) -> None:
    """An earlier export's files, which another split would leave beside the new ones."""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")]:
            old.unlink()
    files.gather(None)
