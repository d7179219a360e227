"""Every layout of a model on given GPUs, with its memory and time, the fastest that fits first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..config import DistributedConfig
from ..training.flops import count_flops
from .checks import model_checks
from .memory import Memory, ModelSizes, held_parameters, memory
from .rules import complete
from .speed import Rates, Speed, speed

# Part of a GPU's memory that a training step can use; the rest is the CUDA context, NCCL's buffers
# and fragmentation.
USABLE = 0.92


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what."""

    gpus: int
    gpus_per_node: int
    gpu_memory: float  # GiB
    seq_len: int  # tokens
    global_batch: int  # sequences in an optimizer step
    precision: str = "bf16"  # or "mixed": fp32 shards


@dataclass(frozen=True)
class Proposal:
    config: DistributedConfig
    checkpointing: bool
    micro_batches: int  # of one sequence, per group of ranks that shares a sequence
    memory: Memory
    speed: Speed
    fits: bool

    def sizes(self) -> dict[str, int | bool]:
        """Arguments of DistributedConfig.for_model and flags of sft that are not the default."""
        names = ("dp_replicate_size", "fsdp_size", "tp_size", "sp_size", "ep_size")
        sizes = {n: getattr(self.config, n) for n in names if getattr(self.config, n) > 1}
        if self.config.enable_sequence_parallel:
            sizes["enable_sequence_parallel"] = True
        return sizes


def propose(model: PreTrainedModel, job: Job, rates: Rates = Rates()) -> list[Proposal]:  # noqa: B008
    """Layouts of `model`, on the meta device, for `job`: those that fit first, then by step time.

    Of each mesh the faster of with and without activation checkpointing that fits.

    Raises:
        ValueError: sizes below 1, a global batch that no mesh can share out, or a model whose
            memory cannot be planned.
    """
    for name in ("gpus", "gpus_per_node", "gpu_memory", "seq_len", "global_batch"):
        if getattr(job, name) <= 0:
            raise ValueError(f"{name}={getattr(job, name)}: give more than 0")
    if job.gpus > job.gpus_per_node and job.gpus % job.gpus_per_node:
        raise ValueError(
            f"gpus={job.gpus} are no whole number of nodes with {job.gpus_per_node} GPUs"
        )
    sizes, flops = ModelSizes(model), count_flops(model)
    found = []
    for config in meshes(model, job):
        groups = config.world_size // (config.sp_size * config.tp_size)
        if job.global_batch % groups:
            continue
        micro_batches = job.global_batch // groups
        held = held_parameters(sizes, config)
        options = []
        for checkpointing in (False, True):
            what = (sizes, config, held, job.seq_len, checkpointing)
            used = memory(*what, micro_batches > 1, job.precision)
            time = speed(*what, flops, micro_batches, job.gpus_per_node, rates, job.precision)
            fits = used.gib <= USABLE * job.gpu_memory
            options.append(Proposal(config, checkpointing, micro_batches, used, time, fits))
        found.append(next((o for o in options if o.fits), options[-1]))
    if not found:
        raise ValueError(
            f"global_batch={job.global_batch} divides among none of the layouts of {job.gpus} "
            f"GPUs; give a multiple of {job.gpus}, or longer sequences that ranks can share"
        )
    return sorted(found, key=lambda p: (not p.fits, p.speed.step if p.fits else p.memory.peak))


def meshes(model: PreTrainedModel, job: Job) -> Iterator[DistributedConfig]:
    """Layouts that the model can be trained with on all GPUs of `job`."""
    for sizes in _sizes(job):
        try:
            config = complete(model, DistributedConfig, sizes)
        except ValueError:
            continue
        if all(check.status != "problem" for check in model_checks(model, config)):
            yield config


def _sizes(job: Job) -> Iterator[dict]:
    nodes = max(1, job.gpus // job.gpus_per_node)
    for replicas in {1, nodes}:
        shard = job.gpus // replicas
        for tp in _powers(min(shard, job.gpus_per_node)):
            fsdp = shard // tp
            for ep in (n for n in range(tp, shard + 1, tp) if shard % n == 0):
                mesh = {"dp_replicate_size": replicas, "fsdp_size": fsdp, "tp_size": tp}
                if tp == 1:
                    yield from (mesh | {"ep_size": ep, "sp_size": sp} for sp in _powers(fsdp))
                elif fsdp * tp == shard:
                    yield mesh | {"ep_size": ep}
                    yield mesh | {"ep_size": ep, "enable_sequence_parallel": True}


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... as far as they divide `most`."""
    return [2**n for n in range(most.bit_length()) if most % 2**n == 0]
