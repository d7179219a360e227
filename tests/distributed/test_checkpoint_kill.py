"""A process that dies at a random moment of saving: the newest checkpoint is whole, and resumes."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.trainer_utils import get_last_checkpoint

from hf_moe_ep.training import CheckpointSaver, load_checkpoint, save_checkpoint
from hf_moe_ep.training import checkpoint_files as files
from tests.distributed.ranks import run_ranks


class Run:
    """A model and an AdamW whose every number is the step; 6 MB, so that writing takes a while."""

    def __init__(self):
        self.model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(3)))
        if dist.is_initialized():
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for param in self.model.parameters():
            param.grad = torch.ones_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def numbers(self):
        states = (self.optimizer.state[p] for p in self.model.parameters())
        return [
            *self.model.parameters(),
            *(s[k] for s in states for k in ("exp_avg", "exp_avg_sq")),
        ]

    @torch.no_grad()
    def set(self, step):
        for tensor in self.numbers():
            tensor.fill_(step)

    def resume(self, folder):
        """The step of the newest checkpoint in `folder`, 0 without one, with every number held."""
        newest = get_last_checkpoint(folder)
        step = 0 if newest is None else load_checkpoint(newest, self.model, self.optimizer)["step"]
        assert newest is None or Path(newest).name == f"checkpoint-{step}"
        assert step == 0 or all((t == step).all() for t in self.numbers())
        return step


def save_and_perhaps_die(folder, seed):
    """Resumes, and saves the next step, with a death set for a random moment of the saving."""
    rng = random.Random(seed)
    victim, moment, asynchronous = rng.randrange(2), rng.random(), rng.random() < 0.5
    run = Run()
    step = run.resume(folder) + 1
    run.set(step)
    if dist.is_initialized():
        dist.barrier()
    start = time.monotonic()
    save_checkpoint(folder / f"rehearsal-{seed}", run.model, run.optimizer)
    took = time.monotonic() - start
    if not dist.is_initialized() or dist.get_rank() == victim:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, cleaning up nothing
        signal.setitimer(signal.ITIMER_REAL, moment * took)
    saver = CheckpointSaver(asynchronous)
    save_checkpoint(
        folder / f"checkpoint-{step}", run.model, run.optimizer, extra={"step": step}, saver=saver
    )
    saver.wait()
    signal.setitimer(signal.ITIMER_REAL, 0)


def check_after(folder, step_before):
    """Nothing is lost, and every checkpoint that is there is whole. Returns the newest's step."""
    step = Run().resume(folder)
    assert step in (step_before, step_before + 1)
    for checkpoint in folder.glob("checkpoint-*"):
        files.verify(checkpoint)
    return step


def die_alone(folder, seed):
    process = mp.get_context("forkserver").Process(target=save_and_perhaps_die, args=(folder, seed))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGALRM)
    return process.exitcode != 0


def die_in_company(folder, seed):
    try:
        run_ranks(2, save_and_perhaps_die, folder, seed)
    except mp.ProcessExitedException as error:
        assert error.signal_name == "SIGALRM"
        return True
    return False


@pytest.mark.parametrize(
    ("die", "deaths"),
    [(die_alone, 5), (die_in_company, 3), pytest.param(die_in_company, 50, marks=pytest.mark.grid)],
)
def test_killed_while_saving(tmp_path, die, deaths):
    seed = seen = step = 0
    while seen < deaths:
        seen += die(tmp_path, seed)
        seed += 1
        assert seed < 3 * deaths + 3, "too few of the deaths came in time"
        step = check_after(tmp_path, step)
        for rehearsal in tmp_path.glob("rehearsal-*"):
            files.discard(rehearsal)
