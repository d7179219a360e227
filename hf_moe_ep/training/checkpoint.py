"""Save and load a sharded run: model, optimizer, scheduler, random numbers, and what you add.

By torch's distributed checkpoint (DCP): every rank writes its own shards, and another layout reads
them. A folder is whole or not there (checkpoint_files.py). In it: `shard-*.safetensors`, which
`from_pretrained` loads; `optimizer/`; `scheduler.pt`; `rank_<r>.pt`; `manifest.json`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.checkpoint import _redistribute_state_dict

from . import checkpoint_files as files

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler.pt"
# A layout decides which parameters share a group, and so their numbers: only names last.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointSaver:
    """Saves checkpoints, in a background thread if asked; every rank makes one and calls it alike.

    asynchronous: `save` returns once the shards are copied to host memory (one copy of this rank's
        share of model and optimizer); the next `save`, and `wait`, wait for the files.
    """

    def __init__(self, asynchronous: bool = False):
        self._pool = ThreadPoolExecutor(1) if asynchronous else None
        self._group = None  # gloo: the thread's collectives must not mix with training's
        self._pending: Future | None = None

    def save(
        self,
        folder: str | os.PathLike,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        write_more: Callable[[Path], None] = lambda incomplete: None,
        info: dict | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Saves to `folder`, which must not exist. Collective.

        write_more: called on every rank with the folder being written, for small files of its own.
        info: JSON values for the manifest. then: called on every rank once the checkpoint is there.

        Raises:
            ValueError: `folder` exists, or a file could not be written; on every rank.
        """
        self.wait()
        folder = Path(folder)
        problem = f"{folder} exists; save to another folder or delete it"
        files.raise_together([problem] if folder.exists() else [])
        incomplete = files.start(folder)
        problems = []
        try:
            write_more(incomplete)
        except OSError as error:
            problems.append(str(error))
        files.raise_together(problems)
        parts = [_model_part(model, incomplete)]
        if optimizer is not None:
            parts.append(_optimizer_part(model, optimizer, incomplete))
        if self._pool is None:
            for state, writer in parts:
                dcp.save(_map(_for_save, state), storage_writer=writer)
            files.finish(incomplete, folder, info or {})
            then()
            return
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        staged = [(_map(_host_copy, state), writer) for state, writer in parts]
        self._pending = self._pool.submit(self._write, staged, incomplete, folder, info or {}, then)

    def wait(self) -> None:
        """Waits for the save in flight, if any, and raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, staged: list, incomplete: Path, folder: Path, info: dict, then) -> None:
        for state, writer in staged:
            dcp.save(state, storage_writer=writer, process_group=self._group)
        files.finish(incomplete, folder, info, self._group)
        then()


def save_checkpoint(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    extra: dict | None = None,
    saver: CheckpointSaver | None = None,
) -> None:
    """Saves a training loop's state to `folder`, which must not exist. Collective.

    extra: of this rank, whatever `torch.load(weights_only=True)` reads: the step, the state of a
        sampler or a dataloader. Random number states (Python, NumPy, torch, the current CUDA
        device) are saved beside it. saver: an asynchronous one, to be waited for at the end.

    Raises:
        ValueError: `folder` exists, or a file could not be written.
    """

    def write_more(incomplete: Path) -> None:
        rank, _ = files.rank_and_world()
        state = {"random": _random_state(), "extra": extra or {}}
        torch.save(state, incomplete / f"rank_{rank}.pt")
        if rank == 0 and scheduler is not None:
            torch.save(scheduler.state_dict(), incomplete / SCHEDULER)

    (saver or CheckpointSaver()).save(folder, model, optimizer, write_more=write_more)


def load_checkpoint(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> dict:
    """Loads what `save_checkpoint` saved, in whatever layout the model has now. Collective.

    Returns this rank's `extra`; rank 0's where the number of ranks has changed, and then random
    number states stay as they are. The same number of ranks continues bit for bit.

    Raises:
        ValueError: on every rank, before anything is loaded: a file is missing, damaged or
            foreign, or a tensor of the model or the optimizer is not in it; the message names it.
    """
    folder = Path(folder)
    rank, world = files.rank_and_world()
    same = files.verify(folder)["world_size"] == world
    check_match(folder, model, optimizer)
    load_model(folder, model)
    if optimizer is not None:
        load_optimizer(folder, model, optimizer)
    if scheduler is not None:
        load_scheduler(folder, scheduler)
    state = torch.load(folder / f"rank_{rank if same else 0}.pt", weights_only=True)
    if same:
        _set_random_state(state["random"])
    return state["extra"]


def load_model(folder: Path, model: nn.Module) -> None:
    """Loads the weights of a verified checkpoint into `model`, keeping its layout. Collective."""
    reader = HuggingFaceStorageReader(str(folder))
    set_model_state_dict(model, _load(_model_state(model), reader), options=_saved_of(model))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer of a verified checkpoint, keeping its layout. Collective."""
    state = {OPTIMIZER: _optimizer_state(model, optimizer)}
    state = _load(state, dcp.FileSystemReader(folder / OPTIMIZER))
    groups = list(enumerate(optimizer.param_groups))
    empty = [(n, group) for n, group in groups if not group["params"]]  # torch 2.13 fails on them
    optimizer.param_groups = [group for _, group in groups if group["params"]]
    try:
        set_optimizer_state_dict(model, optimizer, state[OPTIMIZER], options=BY_NAME)
    finally:
        for n, group in empty:
            optimizer.param_groups.insert(n, group)


def load_scheduler(folder: Path, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Loads the scheduler of a verified checkpoint.

    Raises:
        ValueError: this layout makes another number of parameter groups, and not all that were
            saved have the same learning rate, so that it is open which one a group gets.
    """
    path = folder / SCHEDULER
    state, groups = torch.load(path, weights_only=True), len(scheduler.base_lrs)
    saved = len(state["base_lrs"])
    for key in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = state.get(key, [])
        if len(values) in (0, groups):
            continue
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{path}: {saved} parameter groups with {key} {values}, and this layout has "
                f"{groups}; resume in the layout that was saved, or use one learning rate"
            )
        state[key] = values[:1] * groups
    scheduler.load_state_dict(state)


def check_match(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Holds the names and shapes in a checkpoint against those of `model` and `optimizer`.

    Raises:
        ValueError: on every rank; names the folder and the first tensor that does not fit.
    """
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    wanted = _model_state(model)
    problems = [f"{folder}: {p}" for p in _differences(wanted, saved, "model")]
    if unknown := [name for name in saved if name not in wanted]:
        problems.append(f"{folder}: {unknown[0]} is not in the model; it is of another model")
    if optimizer is not None and not problems:
        where = folder / OPTIMIZER / ".metadata"
        if where.is_file():
            reader = dcp.FileSystemReader(folder / OPTIMIZER)
            wanted = {OPTIMIZER: _optimizer_state(model, optimizer)}
            wanted = {f"{OPTIMIZER}.{name}": value for name, value in wanted[OPTIMIZER].items()}
            saved = reader.read_metadata().state_dict_metadata
            problems = [f"{where}: {p}" for p in _differences(wanted, saved, "optimizer")]
        else:
            problems = [f"{where} does not exist: the checkpoint holds no optimizer"]
    files.raise_together(problems[:1])


def _differences(wanted: dict, saved: dict, owner: str) -> list[str]:
    found = []
    for name, value in wanted.items():
        if name not in saved:
            found.append(f"{name} of the {owner} is missing")
        elif torch.is_tensor(value) and tuple(saved[name].size) != tuple(value.shape):
            found.append(
                f"{name} has shape {tuple(saved[name].size)}, and in the {owner} "
                f"{tuple(value.shape)}"
            )
    return found


def _model_part(model: nn.Module, folder: Path) -> tuple[dict, dcp.StorageWriter]:
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    return _untied(_model_state(model)), writer


def _untied(state: dict) -> dict:
    """Weights under two names copied for the second: safetensors holds no memory twice."""
    seen, found = set(), {}
    for name, value in state.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        tied = local.numel() and local.data_ptr() in seen
        found[name] = value.clone() if tied else value
        seen.add(local.data_ptr())
    return found


def _optimizer_part(model, optimizer, folder: Path) -> tuple[dict, dcp.StorageWriter]:
    writer = dcp.FileSystemWriter(folder / OPTIMIZER)
    return {OPTIMIZER: _optimizer_state(model, optimizer)}, writer


def _model_state(model: nn.Module) -> dict:
    return get_model_state_dict(model, options=_saved_of(model))


def _saved_of(model: nn.Module) -> StateDictOptions:
    """All of a model; with PEFT adapters what is trained, and the rest comes from its own files."""
    if getattr(model, "peft_config", None):
        return StateDictOptions(ignore_frozen_params=True, strict=False)
    return StateDictOptions()


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return get_optimizer_state_dict(model, optimizer, options=BY_NAME)


def _map(function: Callable, *states: dict) -> dict:
    """`function` of the values that stand at the same place in nested dicts."""
    found = {}
    for key, value in states[0].items():
        values = [state[key] for state in states]
        found[key] = _map(function, *values) if isinstance(value, dict) else function(*values)
    return found


def _one_piece(value):
    """A shard that is several pieces of its tensor made one piece of it; all else as it is.

    DCP takes a shard for one piece (`_redistribute_state_dict` in transformers has the story).
    Several come from FSDP over a dim that EP or TP shards too. Over an axis of one rank, such as
    efsdp where ep = fsdp * tp, it is one piece under another name: same memory, nothing moves.
    """
    if not isinstance(value, DTensor):
        return value
    strided = [n for n, p in enumerate(value.placements) if isinstance(p, _StridedShard)]
    if any(value.device_mesh.size(n) > 1 for n in strided):
        try:
            return _redistribute_state_dict(value)
        except ValueError as error:  # seen with torch 2.11, not with 2.13: experts split by tp
            raise ValueError(
                f"torch {torch.__version__} cannot put the shards {value.placements} of a weight "
                "together: use torch 2.13, or split the experts by ep_size instead of tp_size"
            ) from error
    if not strided:
        return value
    placements = [Shard(p.dim) if n in strided else p for n, p in enumerate(value.placements)]
    return DTensor.from_local(
        value.to_local(),
        value.device_mesh,
        placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def _for_save(value):
    """One piece, where it is; what had to be put together waits in host memory."""
    one = _one_piece(value)
    return one.cpu() if _is_copy(one, value) else one


def _host_copy(value):
    """One piece, in host memory, where training cannot change it."""
    one = _one_piece(value)
    return one.detach().to("cpu", copy=True) if torch.is_tensor(one) else one


def _is_copy(one, value) -> bool:
    if not isinstance(value, DTensor):
        return False
    return one.to_local().data_ptr() != value.to_local().data_ptr()


def _load(state: dict, reader: dcp.StorageReader) -> dict:
    """`state` with what `reader` has, in its own layout, and where possible in its own memory."""
    loaded = _map(_one_piece, state)
    dcp.load(loaded, storage_reader=reader)

    def as_it_was(one, value):
        if not isinstance(value, DTensor):
            return one
        return _redistribute_state_dict(one, value) if _is_copy(one, value) else value

    return _map(as_it_was, loaded, state)


def _random_state() -> dict:
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
