"""The product of two FP8 matrices with fine-grained scales (V3 section 3.3.2), and a model of the accumulator that it works around.

Hopper's tensor cores add FP8 products with about 14 bits. Every 128 elements of the summed dimension, one tile of both operands, the
partial sum is therefore promoted: multiplied by the tiles' scales and added in float32. `fp8_gemm` is that, in that order.
"""

import torch
from torch import Tensor

from finback.ops.fp8 import TILE
from finback.ops.linear import rows_times

_MMA_DEPTH = 32  # elements of the summed dimension that one instruction adds
ACCUMULATOR_BITS = 13
"""Of the accumulator's about 14 bits, those that are not the sign. The paper does not say whether the sign counts; with it, the
error at K = 4096 comes closer to the 2% that was measured."""


@torch.no_grad()
def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a b^T for payloads in E4M3: a [M, K] with scales [M, ceil(K / 128)]; b [N, K] with scales [ceil(N / 128), ceil(K / 128)] of
    128 x 128 blocks (a weight), or [N, ceil(K / 128)] of its rows (the weight gradient's second operand).

    Raises ValueError if shapes do not fit.
    """
    columns = _scales_per_column(a, a_scale, b, b_scale)
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for tile, start in enumerate(range(0, a.shape[1], TILE)):
        partial = a[:, start : start + TILE].float() @ b[:, start : start + TILE].float().t()
        total += partial * a_scale[:, tile, None] * columns[None, :, tile]
    return total.to(out_dtype)


@torch.no_grad()
def dequantized_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`fp8_gemm` in one float32 product, for devices that have no FP8: equal but for float32's rounding. Products of two E4M3
    values are exact in float32, and its sums keep ten bits more than the tensor cores'."""
    columns = _scales_per_column(a, a_scale, b, b_scale)
    left = a.float() * _per_element(a_scale, a.shape[1])
    right = b.float() * _per_element(columns, b.shape[1])
    return rows_times(left, right.t()).to(out_dtype)


def _scales_per_column(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The scales of b as [N, tiles of K]; checks every shape."""
    tiles = -(-a.shape[1] // TILE)
    if a.shape[1] != b.shape[1] or a_scale.shape != (a.shape[0], tiles):
        raise ValueError(
            f"fp8_gemm got a {list(a.shape)} with scales {list(a_scale.shape)} and b {list(b.shape)}; it needs a [M, K], b [N, K] "
            f"and scales [M, {tiles}] of a"
        )
    blocks = (-(-b.shape[0] // TILE), tiles)
    if b_scale.shape == blocks and b_scale.shape[0] != b.shape[0]:
        return b_scale.repeat_interleave(TILE, dim=0)[: b.shape[0]]
    if b_scale.shape == (b.shape[0], tiles):
        return b_scale
    raise ValueError(
        f"fp8_gemm got scales {list(b_scale.shape)} for b {list(b.shape)}; it needs {list(blocks)} of blocks or "
        f"{[b.shape[0], tiles]} of rows"
    )


def _per_element(scale: Tensor, size: int) -> Tensor:
    return scale.repeat_interleave(TILE, dim=1)[:, :size]


@torch.no_grad()
def tensor_core_product(a: Tensor, b: Tensor, *, bits: int = ACCUMULATOR_BITS, promote_every: int | None = None) -> Tensor:
    """a b^T as Hopper's FP8 tensor cores are described to add (V3 section 3.5.2): of each 32 products the mantissas are aligned to the
    largest and cut below `bits` bits, their sum is added to an accumulator, which is cut to `bits` bits again.

    With `promote_every` (128 in V3), the accumulator is added to a float32 sum and cleared after so many elements. The entries of a
    and b should be E4M3 values; the result is float64 so that nothing else is lost.
    """
    a, b = a.double(), b.double()
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    accumulator = torch.zeros_like(total)
    for start in range(0, a.shape[1], _MMA_DEPTH):
        stop = min(start + _MMA_DEPTH, a.shape[1])
        products = a[:, None, start:stop] * b[None, :, start:stop]
        largest = products.abs().amax(dim=-1, keepdim=True)
        accumulator = _cut(accumulator + _cut(products, largest, bits).sum(dim=-1), None, bits)
        if promote_every is not None and stop % promote_every == 0:
            total, accumulator = (total + accumulator).float().double(), torch.zeros_like(accumulator)
    return total + accumulator


def _cut(values: Tensor, largest: Tensor | None, bits: int) -> Tensor:
    """Cut the bits of `values` below the `bits` highest of `largest`, of their own where that is None."""
    exponent = torch.frexp(values if largest is None else largest)[1]
    unit = torch.ldexp(torch.ones_like(values), exponent - bits)
    return torch.trunc(values / unit) * unit
