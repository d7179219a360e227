"""An optimizer's passes over many tensors, one launch for all: sum of squares, scaling, AdamW.

A row of table_ptr int64 is a tensor: its addresses and its number of values. A row of places_ptr
(programs, 2) int32 is a program's work: the tensor, and which PART of its values. ALIGNED: all
tensors are multiples of 16 bytes, address and size.
"""

import triton
import triton.language as tl


@triton.jit
def _address(table_ptr, n, column, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table_ptr + n * WIDTH + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def _size(table_ptr, n, column, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    size = tl.load(table_ptr + n * WIDTH + column)
    return tl.multiple_of(size, 128 // DTYPE.primitive_bitwidth) if ALIGNED else size


@triton.jit
def square_sum_kernel(
    partial_ptr, table_ptr, places_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of each part, into partial_ptr (programs,) fp32."""
    place = places_ptr + tl.program_id(0) * 2
    n, part = tl.load(place), tl.load(place + 1)
    values = _address(table_ptr, n, 0, 2, DTYPE, ALIGNED)
    size = _size(table_ptr, n, 1, 2, DTYPE, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, PART, BLOCK):
        i = part.to(tl.int64) * PART + at + tl.arange(0, BLOCK)
        x = tl.load(values + i, mask=i < size, other=0.0).to(tl.float32)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def scale_kernel(
    factor_ptr, table_ptr, places_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values *= factor; nothing is read where the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        place = places_ptr + tl.program_id(0) * 2
        n, part = tl.load(place), tl.load(place + 1)
        values = _address(table_ptr, n, 0, 2, DTYPE, ALIGNED)
        size = _size(table_ptr, n, 1, 2, DTYPE, ALIGNED)
        for at in range(0, PART, BLOCK):
            i = part.to(tl.int64) * PART + at + tl.arange(0, BLOCK)
            x = tl.load(values + i, mask=i < size, other=0.0).to(tl.float32)
            tl.store(values + i, (x * factor).to(DTYPE), mask=i < size)


@triton.jit
def adamw_kernel(
    table_ptr, places_ptr, lr, decay, eps, rest1, rest2, log_beta1, log_beta2,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr,
    ALIGNED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step; rest is 1 - beta, decay lr times weight decay. A row of the table: parameter,
    gradient, both moments, the count of steps with this one, size.
    """
    place = places_ptr + tl.program_id(0) * 2
    n, part = tl.load(place), tl.load(place + 1)
    params = _address(table_ptr, n, 0, 6, PARAM, ALIGNED)
    grads = _address(table_ptr, n, 1, 6, GRAD, ALIGNED)
    means = _address(table_ptr, n, 2, 6, MEAN, ALIGNED)
    squares = _address(table_ptr, n, 3, 6, SQUARE, ALIGNED)
    steps = tl.load(table_ptr + n * 6 + 4).to(tl.pointer_type(tl.float32))
    size = _size(table_ptr, n, 5, 6, PARAM, ALIGNED)
    # In fp64: in the first steps 1 - beta2^step is small.
    step = tl.load(steps).to(tl.float64)
    step_size = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
    unbias = (1.0 / tl.sqrt(1.0 - tl.exp(step * log_beta2))).to(tl.float32)
    for at in range(0, PART, BLOCK):
        i = part.to(tl.int64) * PART + at + tl.arange(0, BLOCK)
        there = i < size
        p = tl.load(params + i, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grads + i, mask=there, other=0.0).to(tl.float32)
        m = tl.load(means + i, mask=there, other=0.0).to(tl.float32)
        v = tl.load(squares + i, mask=there, other=0.0).to(tl.float32)
        p -= decay * p
        m += rest1 * (g - m)
        v += rest2 * (g * g - v)
        p -= step_size * (m / (tl.sqrt(v) * unbias + eps))
        tl.store(params + i, p.to(PARAM), mask=there)
        tl.store(means + i, m.to(MEAN), mask=there)
        tl.store(squares + i, v.to(SQUARE), mask=there)
