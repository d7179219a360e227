"""Times several implementations of one thing side by side, and measures the memory of a training
step.

Every figure comes from the same process and the same minutes: a round calls each implementation
once, and rounds are repeated until the time is used up, so that a drift of the clock hits all
alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 10, 200
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """What repeated calls took, in milliseconds."""

    median_ms: float  # e.g. 7.46
    p10_ms: float  # a tenth of the calls was faster, e.g. 7.41
    p90_ms: float  # a tenth of the calls was slower, e.g. 7.62
    rounds: int  # calls measured, e.g. 52


@dataclass(frozen=True)
class Memory:
    """Memory of one training step, in MiB over what was allocated at its start (inputs and weights
    exist then).
    """

    saved_mib: float  # kept between forward and backward, without the output, e.g. 386.0
    peak_mib: float | None  # the most during the step, with gradients; None on a CPU. 2914.0


def spread(times_ms: list[float]) -> Spread:
    """Median and the outer deciles of at least two times."""
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
    return Spread(statistics.median(times_ms), deciles[0], deciles[-1], len(times_ms))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ColdCache:
    """Called before every measured call: writes over the L2 cache, as the layers in between do in a
    model.
    """

    def __init__(self, device: torch.device):
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.buffer = torch.empty(4 * l2, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


class ColdIdleDevice(ColdCache):
    """As ColdCache, and then waits: the measured call starts on an idle device, so its launches are
    in its time.
    """

    def __call__(self) -> None:
        super().__call__()
        synchronize(self.buffer.device)


def _cuda_round(order: list[Callable[[], object]], before: Callable[[], None]) -> list[float]:
    """Milliseconds of each call, in the order given, by CUDA events; one synchronisation at the end
    of the round.
    """
    events = []
    for call in order:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _cpu_round(order: list[Callable[[], object]], before: Callable[[], None]) -> list[float]:
    times = []
    for call in order:
        before()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def interleave(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    before: Callable[[], None] | None = None,
    agree: Callable[[list[float]], list[float]] = lambda times: times,
) -> dict[str, Spread]:
    """Round-robin over `calls` for about `seconds`, at least 10 and at most 200 rounds.

    Each round takes the calls in another order, so that none always follows the same neighbour: a
    GPU at its power limit is slower after a call that heats it. Two rounds of warm-up come first.
    `before` runs before every call, outside the measured time; by default it clears the L2 cache.
    `agree` makes the times of several processes one, so that all run the same rounds.
    """
    before = before or ColdCache(device)
    one_round = _cuda_round if device.type == "cuda" else _cpu_round
    names = list(calls)
    one_round(list(calls.values()), before)
    started = time.perf_counter()
    one_round(list(calls.values()), before)
    (round_s,) = agree([time.perf_counter() - started])
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / round_s)))
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffled = random.Random(0)  # the same on every process
    for _ in range(rounds):
        order = shuffled.sample(names, len(names))
        round_ms = agree(one_round([calls[n] for n in order], before))
        for name, ms in zip(order, round_ms, strict=True):
            times[name].append(ms)
    return {name: spread(ms) for name, ms in times.items()}


def memory_of_step(
    forward: Callable[[], torch.Tensor], grad: torch.Tensor, leaves: list[torch.Tensor]
) -> Memory:
    """Memory of `forward().backward(grad)`; the gradients of `leaves` are dropped before and after.

    On CUDA the figures come from the allocator. On a CPU the saved memory is that of the distinct
    storages which autograd packs, the output and the leaves left out, and there is no peak.
    """
    drop_gradients(leaves)
    if grad.device.type != "cuda":
        memory = Memory(_packed_mib(forward, grad, leaves), None)
        drop_gradients(leaves)
        return memory
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - base - y.untyped_storage().nbytes()
    y.backward(grad)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    del y
    drop_gradients(leaves)
    return Memory(saved / MIB, peak / MIB)


def _packed_mib(
    forward: Callable[[], torch.Tensor], grad: torch.Tensor, leaves: list[torch.Tensor]
) -> float:
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    for not_saved in (y, *leaves):
        storages.pop(not_saved.untyped_storage().data_ptr(), None)
    y.backward(grad)
    return sum(storages.values()) / MIB


def drop_gradients(leaves: list[torch.Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
