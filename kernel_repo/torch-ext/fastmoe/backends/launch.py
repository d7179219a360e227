"""Launches of Triton kernels that look at their arguments once for each kind of call.

Triton's own launch binds and inspects every argument each time; a layer of few tokens, and expert
parallelism, would wait for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

ALIGNMENT = 16  # bytes; Triton compiles for addresses that are multiples of it, and for others
_DIRECT = ((3, 6), (3, 7))  # versions of Triton whose compiled kernels take `run` as it is here
_compiled: dict[tuple, Any] = {}  # kind of call -> its compiled kernel


class Tiles(NamedTuple):
    """An array that a kernel reads or writes by bulk copies (TMA), a block at a time."""

    array: torch.Tensor
    shape: tuple[int, ...]  # the kernel's view of the array's memory. (262144, 2048)
    block: tuple[int, ...]  # (128, 64)
    layout: Any = None  # a Gluon kernel's layout of the block in shared memory
    strides: tuple[int, ...] | None = None  # of the view, in elements; None: of contiguous memory


def ragged(rows: torch.Tensor, block: tuple[int, int], layout: Any = None) -> Tiles:
    """Rows (S, N) in blocks of (rows, columns), N contiguous.

    Bulk copies of them end where the kernel says: backends/triton/gemm.py has how.
    """
    stride = rows.stride(0)
    many = (1 << 31) - (1 << 16)  # a bound that no coordinate meets
    return Tiles(
        rows, (many, many, 1 << 30, rows.shape[1]), (1, 1, *block), layout,
        ((1 << 34) - stride, stride, stride, 1),
    )  # fmt: skip


class Launch(NamedTuple):
    """What was launched, for those who would launch it again."""

    compiled: Any  # Triton's compiled kernel
    grid: tuple[int, ...]  # (128,)
    tensors: tuple[torch.Tensor | Tiles | None, ...]
    rest: tuple  # the numbers and constants that follow them


class _Thread(threading.local):
    bound: torch.device | None = None  # the device whose context this thread has
    launches: list[Launch | None] | None = None  # while `recorded` collects them


_thread = _Thread()


@contextmanager
def recorded() -> Iterator[list[Launch | None]]:
    """This thread's launches meanwhile; None for one that Triton has to look at each time."""
    before = _thread.launches
    launches = _thread.launches = []
    try:
        yield launches
    finally:
        _thread.launches = before


def launch(
    kernel,
    grid: tuple[int, ...],
    tensors: tuple[torch.Tensor | Tiles | None, ...],
    numbers: tuple[int, ...],
    constants: tuple,
    **options: int,
) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)`, on the device of the first tensor.

    numbers: integers that the kernel is declared not to specialise on. constants: all else,
    hashable. What Triton compiles differently for is the key of the kind: types, constants,
    options, device, and numbers beyond 32 bits; addresses that are not aligned go the usual way,
    and so does every launch that a profiler of Triton's wants to see, or with another Triton.
    """
    device = tensors[0].array.device if type(tensors[0]) is Tiles else tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, **options)
        return
    pointers, types, addresses, tiled = [], [], 0, False
    for t in tensors:
        if t is None:
            pointers.append(None)
            types.append(None)
        elif type(t) is Tiles:
            tiled = True
            pointers.append(t.array.data_ptr())
            types.append((t.array.dtype, t.block))
        else:
            pointers.append(address := t.data_ptr())
            types.append(t.dtype)
            addresses |= address
    if tiled:
        bind_context(device)
    wide = [n >= 1 << 31 for n in numbers]
    key = (kernel.fn, device, *types, *wide, constants, *options.values())
    aligned = addresses % ALIGNMENT == 0
    compiled = _compiled.get(key) if aligned else None
    if compiled is not None and (stream_of := direct()) is not None:
        if tiled:
            pointers = [
                by_address(p, t.array.dtype, *t[1:]) if type(t) is Tiles else p
                for p, t in zip(pointers, tensors, strict=True)
            ]
        x, y, z, *_ = *grid, 1, 1
        compiled.run(
            x, y, z, stream_of(device.index), compiled.function, compiled.packed_metadata,
            None, None, None, *pointers, *numbers, *constants,
        )  # fmt: skip
    else:
        described = [_descriptor(*t) if type(t) is Tiles else t for t in tensors]
        compiled = kernel[grid](*described, *numbers, *constants, **options)
        if not aligned:
            compiled = None
        elif compiled is not None:  # None under the interpreter
            _compiled[key] = compiled
    if _thread.launches is not None:
        made = Launch(compiled, grid, tensors, (*numbers, *constants))
        _thread.launches.append(None if compiled is None else made)


def bind_context(device: torch.device) -> None:
    """Give this thread a CUDA context, once.

    Encoding a tensor descriptor needs one, and autograd's threads start without (Triton 3.6 binds
    one at a launch, but encodes the descriptors first).
    """
    if device.type == "cuda" and _thread.bound != device:
        torch.zeros(1, device=device)
        _thread.bound = device


class _Address(NamedTuple):
    """Stands in for an array in a descriptor that is kept, which must not keep memory alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(4096)
def by_address(address: int, dtype: torch.dtype, *how: Any):
    """The descriptor of an array at this address; how: what `Tiles` says after the array."""
    return _descriptor(_Address(address, dtype), *how)


def _descriptor(array, shape: tuple, block: tuple, layout: Any, strides: tuple | None):
    if strides is None:
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    described = (array, list(shape), list(strides), list(block))
    if layout is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(*described)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(*described, layout)


def direct() -> Callable[[int], int] | None:
    """What gives a device's current stream, where a launch may go around Triton's own."""
    known, driver, settings = _triton()
    enter, leave = settings.launch_enter_hook, settings.launch_exit_hook
    if not known or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    return driver.active.get_current_stream


@lru_cache
def _triton():
    """Whether this Triton's compiled kernels are known; its driver; its settings of launches."""
    import triton
    from triton.knobs import runtime
    from triton.runtime import driver

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in _DIRECT, driver, runtime


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is n or more, n >= 1: how wide a block has to be."""
    return 1 << (n - 1).bit_length()
