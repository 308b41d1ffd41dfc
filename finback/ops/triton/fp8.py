"""The FP8 casts of `finback.ops.fp8` in Triton: same payloads, same scales, bit for bit.

Each program reads whole tiles once and writes a byte a value: the floor is three bytes of traffic a bfloat16 value. Division is rounded
as IEEE 754 has it, since a reciprocal would move some codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.fp8 import FP8, LARGEST_CODE, SMALLEST_ACTIVATION_AMAX, TILE

_SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
_LARGEST = tl.constexpr(LARGEST_CODE)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _finished_scale(amax, ue8m0: tl.constexpr):
    """The scale of a tile from its bounded largest magnitude."""
    scale = tl.maximum(tl.div_rn(amax, _LARGEST), _SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    if ue8m0:
        bits = scale.to(tl.int32, bitcast=True)
        power = (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(scale == scale, power, scale)
    return scale


@triton.jit
def _codes(values, scale):
    """values / scale as the nearest codes; nan stays nan."""
    quotient = tl.div_rn(values, scale)
    bounded = tl.minimum(
        tl.maximum(quotient, -_LARGEST, propagate_nan=tl.PropagateNan.ALL), _LARGEST, propagate_nan=tl.PropagateNan.ALL
    )
    if _INTERPRETED:
        # The device's conversion rounds to nearest even and knows nan. The interpreter's loses carries: it gets what needs no rounding.
        power = (bounded.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^23 steps of 2^-3 of the value's power of two, 2^-6 at least
        rounded = (bounded + shift) - shift
        rounded = tl.where(rounded == 0, bounded * 0.0, rounded)  # zero keeps its sign
        codes = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(bounded == bounded, codes, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return bounded.to(tl.float8e4nv)


@triton.jit
def _amax(values, axis: tl.constexpr):
    """Largest magnitude along an axis; nan where there is one."""
    largest = tl.max(tl.abs(values), axis)
    has_nan = tl.max((values != values).to(tl.int32), axis)
    return tl.where(has_nan > 0, float("nan"), largest)


@triton.jit
def quantize_rows_kernel(
    x, payload, scale, rows, columns, tiles, smallest_amax, ue8m0: tl.constexpr, block_rows: tl.constexpr, tile: tl.constexpr
):
    """x [rows, columns] -> payload [rows, columns], scale [rows, tiles]: a program takes block_rows rows of one tile of channels."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    offset = row[:, None].to(tl.int64) * columns + column[None, :]
    values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    bounded = tl.maximum(_amax(values, 1), smallest_amax, propagate_nan=tl.PropagateNan.ALL)
    factor = _finished_scale(bounded, ue8m0)
    tl.store(payload + offset, _codes(values, factor[:, None]), mask=mask)
    tl.store(scale + row.to(tl.int64) * tiles + tl.program_id(1), factor, mask=row < rows)


@triton.jit
def quantize_over_rows_kernel(
    x, payload, scale, rows, columns, tiles, smallest_amax, ue8m0: tl.constexpr, block_columns: tl.constexpr, tile: tl.constexpr
):
    """x [rows, columns] -> payload [columns, rows], scale [columns, tiles of rows]: transposed, in tiles of 128 rows x 1 column."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    values = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    bounded = tl.maximum(_amax(values, 0), smallest_amax, propagate_nan=tl.PropagateNan.ALL)
    factor = _finished_scale(bounded, ue8m0)
    codes = tl.trans(_codes(values, factor[None, :]))
    tl.store(payload + column[:, None].to(tl.int64) * rows + row[None, :], codes, mask=tl.trans(mask))
    tl.store(scale + column.to(tl.int64) * tiles + tl.program_id(0), factor, mask=column < columns)


@triton.jit
def quantize_blocks_kernel(x, payload, scale, rows, columns, tiles, ue8m0: tl.constexpr, tile: tl.constexpr):
    """x [rows, columns] -> payload [rows, columns], scale [., tiles]: a program takes one block of 128 x 128."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    offset = row[:, None].to(tl.int64) * columns + column[None, :]
    values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    amax = _amax(tl.reshape(values, (1, tile * tile)), 1)
    # A block of zeros has scale 1.
    factor = _finished_scale(tl.where(amax == 0, _LARGEST, amax), ue8m0)
    tl.store(payload + offset, _codes(values, factor[:, None]), mask=mask)
    tl.store(scale + tl.program_id(0) * tiles + tl.program_id(1) + tl.arange(0, 1), factor)


def quantize_1x128(x: Tensor, *, ue8m0: bool = False, smallest_amax: float = SMALLEST_ACTIVATION_AMAX) -> tuple[Tensor, Tensor]:
    """As `finback.ops.fp8.quantize_1x128`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, columns = flat.shape
    tiles = -(-columns // TILE)
    payload = torch.empty(flat.shape, dtype=FP8, device=x.device)
    scale = torch.empty(rows, tiles, dtype=torch.float32, device=x.device)
    if flat.numel():
        block_rows = 32
        grid = (triton.cdiv(rows, block_rows), tiles)
        quantize_rows_kernel[grid](flat, payload, scale, rows, columns, tiles, smallest_amax, ue8m0, block_rows, TILE)
    return payload.view(x.shape), scale.view(*x.shape[:-1], tiles)


def quantize_over_rows(
    x: Tensor, *, ue8m0: bool = False, smallest_amax: float = SMALLEST_ACTIVATION_AMAX
) -> tuple[Tensor, Tensor]:
    """As `finback.ops.fp8.quantize_1x128` of x^T: x [M, N] -> payload [N, M], scales [N, ceil(M / 128)], without a transposed copy."""
    x = x.contiguous()
    rows, columns = x.shape
    tiles = -(-rows // TILE)
    payload = torch.empty(columns, rows, dtype=FP8, device=x.device)
    scale = torch.empty(columns, tiles, dtype=torch.float32, device=x.device)
    if x.numel():
        block_columns = 64
        grid = (tiles, triton.cdiv(columns, block_columns))
        quantize_over_rows_kernel[grid](x, payload, scale, rows, columns, tiles, smallest_amax, ue8m0, block_columns, TILE)
    return payload, scale


def quantize_128x128(weight: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """As `finback.ops.fp8.quantize_128x128`."""
    if weight.ndim != 2:
        raise ValueError(f"quantize_128x128 needs a matrix [M, N], not a tensor of shape {list(weight.shape)}")
    weight = weight.contiguous()
    rows, columns = weight.shape
    grid = (-(-rows // TILE), -(-columns // TILE))
    payload = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    scale = torch.empty(grid, dtype=torch.float32, device=weight.device)
    if weight.numel():
        quantize_blocks_kernel[grid](weight, payload, scale, rows, columns, grid[1], ue8m0, TILE)
    return payload, scale
