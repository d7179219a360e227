"""Launches of Triton kernels that look at their arguments once for each kind of call.

Triton's own launch binds and inspects every argument each time; a layer of few tokens, and expert
parallelism, would wait for that.
"""

from __future__ import annotations

import torch

_ALIGNMENT = 16  # bytes; Triton compiles for addresses that are multiples of it, and for others
_compiled: dict[tuple, object] = {}  # kind of call -> its compiled kernel


def launch(
    kernel, grid: tuple[int, ...], tensors: tuple, numbers: tuple, constants: tuple, **options: int
) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, **options)`.

    tensors: tensors, host descriptors (TensorDescriptor) or None. numbers: integers that the kernel
    is declared not to specialise on. constants: all else, hashable. What Triton compiles
    differently for is the key of the kind: types, constants, options, device, and numbers beyond 32
    bits; addresses that are not aligned go the usual way.
    """
    addresses, device, types = 0, None, []
    for t in tensors:
        if t is None:
            types.append(None)
        elif isinstance(t, torch.Tensor):
            addresses |= t.data_ptr()
            device = t.device
            types.append(t.dtype)
        else:
            addresses |= t.base.data_ptr()
            types.append((t.base.dtype, *t.block_shape))
    wide = (n >= 1 << 31 for n in numbers)
    key = (kernel.fn, device, *types, *wide, *constants, *options.values())
    found = _compiled.get(key) if addresses % _ALIGNMENT == 0 else None
    if found is not None:
        found[(*grid, 1, 1)](*tensors, *numbers, *constants)
        return
    done = kernel[grid](*tensors, *numbers, *constants, **options)
    if done is not None and addresses % _ALIGNMENT == 0:  # None under the interpreter
        _compiled[key] = done
