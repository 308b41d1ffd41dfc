"""Casts from float32 that round to nearest even in the interpreter, too. On the device they are the instruction."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values as `dtype`."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion loses carries: it gets what needs no rounding.
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, near.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def dot(a, b):
    """a b with float32 sums. The interpreter multiplies the bits of bfloat16 as if they were numbers: it gets float32, in which
    products of two of them are exact."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)
