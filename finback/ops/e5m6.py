"""E5M6, the 12-bit format of the input of the projection behind attention (V3 section 3.3.3): a sign, 5 exponent bits, 6 mantissa bits.

Attention's own backward pass reads the same values, so they are kept finer than E4M3. E5M6 is float16 without the last four bits of
its mantissa, subnormals included, which makes the conversion a rounding of 16-bit integers. Two values share three bytes.
"""

import torch
from torch import Tensor

from finback.ops.fp8 import next_power_of_two, scale_tiles, tile_amax

_DROPPED_BITS = 4
LARGEST_E5M6 = 65024.0  # 2^15 * (2 - 2^-6)


@torch.no_grad()
def quantize_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cast activations [..., N], N even, to packed codes uint8 [..., 3 N / 2] and scales [..., ceil(N / 128)] in float32, one per row
    and 128 channels: powers of two that take the largest magnitude to at most 2^15. Raises ValueError if N is odd."""
    if x.shape[-1] % 2:
        raise ValueError(f"E5M6 packs values in pairs, but the rows have {x.shape[-1]} values; pad them to an even number")
    values = x.to(torch.float32, copy=True)
    amax = tile_amax(values).clamp_min(2.0**-100)
    scale = next_power_of_two(amax) * 2.0**-15
    scale_tiles(values, 1.0 / scale)  # exact: a power of two
    return pack_e5m6(to_e5m6(values)), scale


@torch.no_grad()
def dequantize_e5m6(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The activations [..., N] in `dtype`: what `quantize_e5m6` stands for."""
    values = from_e5m6(unpack_e5m6(packed))
    scale_tiles(values, scale)
    return values.to(dtype)


def to_e5m6(values: Tensor) -> Tensor:
    """float32 -> codes of 12 bits in int16, rounded to nearest, ties to even; what is too large becomes the largest code."""
    # Rounding to float16 first would round twice: 7 bits are cut from a float32 whose exponent is put into float16's range.
    clamped = values.clamp(-LARGEST_E5M6, LARGEST_E5M6)
    step = torch.ldexp(torch.ones_like(clamped), (torch.frexp(clamped)[1] - 1).clamp_min(-14) - 6)
    rounded = torch.round(clamped / step) * step
    codes = rounded.clamp(-LARGEST_E5M6, LARGEST_E5M6).to(torch.float16).view(torch.int16)
    return (codes >> _DROPPED_BITS) & 0xFFF


def from_e5m6(codes: Tensor) -> Tensor:
    """Codes of 12 bits in int16 -> float32, exactly."""
    return (codes << _DROPPED_BITS).view(torch.float16).to(torch.float32)


def pack_e5m6(codes: Tensor) -> Tensor:
    """Codes [..., N] -> bytes [..., 3 N / 2]: the low eight bits of each of a pair, then the high four of both."""
    first, second = codes[..., 0::2].to(torch.int32), codes[..., 1::2].to(torch.int32)
    parts = (first & 0xFF, second & 0xFF, (first >> 8) | (second >> 8 << 4))
    return torch.stack(parts, dim=-1).to(torch.uint8).flatten(-2)


def unpack_e5m6(packed: Tensor) -> Tensor:
    """Bytes [..., 3 N / 2] -> codes int16 [..., N]."""
    low_first, low_second, high = packed.unflatten(-1, (-1, 3)).to(torch.int16).unbind(-1)
    first, second = low_first | ((high & 0xF) << 8), low_second | ((high >> 4) << 8)
    return torch.stack((first, second), dim=-1).flatten(-2)
