"""Tensors of many sizes searched for values that are not finite, one launch for all.

A row of table_ptr (n, 4) int64 is a tensor: its address, its 32-bit words, and the exponent bits of
the low and the high value in a word. A row of places_ptr (programs, 2) int32 is a program's work:
the tensor, and which WORDS of its words.
"""

import triton
import triton.language as tl


@triton.jit
def first_not_finite_kernel(
    first_ptr, table_ptr, places_ptr, numbers_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """The smallest number of a tensor with exponent bits that are all ones, into first_ptr."""
    place = places_ptr + tl.program_id(0) * 2
    n, part = tl.load(place), tl.load(place + 1)
    address = tl.load(table_ptr + n * 4).to(tl.pointer_type(tl.int32))
    words = tl.multiple_of(tl.load(table_ptr + n * 4 + 1), 4)
    low, high = (
        tl.load(table_ptr + n * 4 + 2).to(tl.int32),
        tl.load(table_ptr + n * 4 + 3).to(tl.int32),
    )
    address = tl.multiple_of(address, 16)
    bad = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, WORDS, BLOCK):
        offsets = part.to(tl.int64) * WORDS + at + tl.arange(0, BLOCK)
        word = tl.load(address + offsets, mask=offsets < words, other=0)
        bad |= (((word & low) == low) | ((word & high) == high)).to(tl.int32)
    if tl.max(bad, 0) > 0:
        tl.atomic_min(first_ptr, tl.load(numbers_ptr + n))
