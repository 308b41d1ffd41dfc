"""Grids of integers and rounding to nearest: the baseline that GPTQ is measured against, and what it falls back to."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finback.config import InputError

_LARGEST_SCALE, _SMALLEST_SCALE = 65504.0, 2.0**-24  # of float16


class Grid(NamedTuple):
    """The grid of one group of inputs: float32 [out, 1], each the value of a float16, and its integer zero point."""

    scale: Tensor
    zero: Tensor


class Quantised(NamedTuple):
    """A weight [out, in] on its grids: (values - zeros[:, groups]) * scales[:, groups]."""

    values: Tensor  # int32 [out, in], below 2 ** bits
    scales: Tensor  # float16 [out, groups]
    zeros: Tensor  # int32 [out, groups], at least 1
    groups: Tensor  # int32 [in], the group of each input


def fit_grid(weight: Float[Tensor, "out group"], bits: int, sym: bool) -> Grid:
    """The grid that spans a group. Zero is on it exactly. Its scale is rounded to float16 before anything is rounded to the grid.

    A zero point of 0 is never used: files store it less one, and readers differ in what they make of -1.
    """
    top = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = (high - low) / top
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if sym else (-low / scale).round()
    below = zero < 1
    scale, zero = torch.where(below, high / (top - 1), scale), zero.clamp(1, top)
    if not (scale <= _LARGEST_SCALE).all():
        raise InputError("a weight is inf, nan or beyond the range of float16 scales; look at what the model was trained to")
    return Grid(scale.clamp(min=_SMALLEST_SCALE).half().float(), zero)


def to_grid(weight: Tensor, grid: Grid, bits: int) -> Float[Tensor, "out n"]:
    """The integers nearest to `weight` [out, n], as float32."""
    return ((weight / grid.scale).round() + grid.zero).clamp(0, 2**bits - 1)


def from_grid(values: Tensor, grid: Grid) -> Float[Tensor, "out n"]:
    return (values - grid.zero) * grid.scale


def round_to_nearest(weight: Float[Tensor, "out in"], bits: int, group_size: int, sym: bool) -> Quantised:
    """Each weight to the nearest point of its group's grid; -1 makes one group of the whole width."""
    outputs, width = weight.shape
    size = width if group_size == -1 else group_size
    flat = weight.float().reshape(-1, size)
    grid = fit_grid(flat, bits, sym)
    values = to_grid(flat, grid, bits).view(outputs, width).int()
    groups = torch.arange(width, dtype=torch.int32) // size
    return Quantised(values, grid.scale.view(outputs, -1).half(), grid.zero.view(outputs, -1).int(), groups)


def dequantised(quantised: Quantised) -> Float[Tensor, "out in"]:
    """The weight that the integers stand for, float32: what a model that loads them computes with."""
    index = quantised.groups.long()
    zeros: Int[Tensor, "out in"] = quantised.zeros[:, index]
    return (quantised.values - zeros).float() * quantised.scales.float()[:, index]
