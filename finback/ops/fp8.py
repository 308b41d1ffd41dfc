"""DeepSeek's fine-grained FP8 casts: E4M3 payloads with one float32 scale per tile (V3 section 3.3.2).

A weight [M, N] is cut into blocks of 128 x 128, an activation [..., N] into rows of 128 channels. Each tile stores
`value / scale` as `torch.float8_e4m3fn`, where `scale` maps the tile's largest magnitude to 448, the format's largest
code. What DeepSeek's files call `scale_inv` is that scale: the factor that takes the payload back to the value.

Ragged edges belong to a smaller tile; nothing is padded. A block of weights that is all zero has scale 1, and no scale
is below float32's smallest normal number, so that none is ever zero. Activations bound the largest magnitude below by
1e-4 instead, as DeepSeek's own code for inference does; gradients, which are smaller, do not. A tile that holds inf or nan gets an
infinite or nan scale: nothing here waits for the device to look.

A scale may be rounded up to a power of two (UE8M0, V3 section 3.3.3): dequantising and quantising in another direction then moves
only the values that the new tile's scale makes too small.

Requantising is stable. With a = 448 * s rounded to float32, a / 448 is s or its neighbour, and a second round gives the
same number again; the quotients move by far less than half a code. So a payload whose blocks reach code 448 comes back
unchanged, and whatever was quantised once stays as it is. All arithmetic is float32, whatever the dtypes outside.

Where the values were rounded to bfloat16 in between, payloads still come back unchanged (the quotients move by at most
one part in 128, the nearest rounding border is one part in 30 away), but each scale moves by up to one part in 256: 448
times a float32 scale has no exact bfloat16. It moves once; powers of two do not move at all. Float32 keeps the scales.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST_CODE = 448.0
TILE = 128
SMALLEST_ACTIVATION_AMAX = 1e-4
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_STRIP_ELEMENTS = 1 << 21  # float32 scratch of a cast: 8 MiB, about what stays in cache


@torch.no_grad()
def quantize_128x128(weight: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Cast a weight [M, N] to its payload [M, N] in E4M3 and scale_inv [ceil(M / 128), ceil(N / 128)] in float32, with `ue8m0` a power
    of two.

    Works strip by strip: beside its results it needs a few MiB. Raises ValueError if `weight` is not a matrix.
    """
    if weight.ndim != 2:
        raise ValueError(f"quantize_128x128 needs a matrix [M, N], not a tensor of shape {list(weight.shape)}")
    rows, columns = weight.shape
    payload = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    scale_inv = torch.empty(_tiles(rows), _tiles(columns), dtype=torch.float32, device=weight.device)
    for strip, blocks in _strips(rows, columns):
        values = weight[strip].to(torch.float32, copy=True)
        scale = _block_amax(values) / LARGEST_CODE
        scale = torch.where(scale == 0, 1.0, scale.clamp_min(_SMALLEST_SCALE))
        if ue8m0:
            scale = next_power_of_two(scale)
        scale_inv[blocks] = scale
        _store(payload[strip], values, _per_row(scale, values.shape[0]))
    return payload, scale_inv


@torch.no_grad()
def dequantize_128x128(
    payload: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """The weight [M, N] in `dtype`: payload * scale_inv in float32, block by block, rounded once at the end.

    With `out`, a tensor [M, N] of any float dtype, the weight is written there and `dtype` is not used.
    Raises ValueError if the grid of scales does not fit the payload's shape.
    """
    rows, columns = payload.shape
    grid = (_tiles(rows), _tiles(columns))
    if scale_inv.shape != grid:
        raise ValueError(f"scale_inv has shape {list(scale_inv.shape)}, a {rows} x {columns} payload needs {list(grid)}")
    weight = torch.empty(rows, columns, dtype=dtype, device=payload.device) if out is None else out
    for strip, blocks in _strips(rows, columns):
        values = payload[strip].to(torch.float32)
        scale_tiles(values, _per_row(scale_inv[blocks].to(torch.float32), values.shape[0]))
        weight[strip] = values
    return weight


@torch.no_grad()
def quantize_1x128(x: Tensor, *, ue8m0: bool = False, smallest_amax: float = SMALLEST_ACTIVATION_AMAX) -> tuple[Tensor, Tensor]:
    """Cast activations [..., N] to their payload [..., N] in E4M3 and scales [..., ceil(N / 128)] in float32.

    One scale per row and 128 channels: max(amax, smallest_amax) / 448, with `ue8m0` rounded up to a power of two.
    """
    values = x.to(torch.float32, copy=True)
    scale = (tile_amax(values).clamp_min(smallest_amax) / LARGEST_CODE).clamp_min(_SMALLEST_SCALE)
    if ue8m0:
        scale = next_power_of_two(scale)
    payload = torch.empty(x.shape, dtype=FP8, device=x.device)
    _store(payload, values, scale)
    return payload, scale


@torch.no_grad()
def dequantize_1x128(payload: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The activations [..., N] in `dtype`: what `quantize_1x128` stands for."""
    values = payload.to(torch.float32)
    scale_tiles(values, scale)
    return values.to(dtype)


def next_power_of_two(scale: Tensor) -> Tensor:
    """Each positive float32 rounded up to a power of two, exactly; inf and nan stay."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent with mantissa in [0.5, 1)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(torch.isfinite(scale), power, scale)


def _tiles(size: int) -> int:
    return -(-size // TILE)


def _strips(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into strips of whole block rows: for each, the slice of its rows and that of its block rows."""
    step = max(1, _STRIP_ELEMENTS // (TILE * max(1, columns)))
    for block in range(0, _tiles(rows), step):
        yield slice(block * TILE, min((block + step) * TILE, rows)), slice(block, block + step)


def _per_row(scale: Tensor, rows: int) -> Tensor:
    """Repeat scales of blocks [m, n] for each row of their blocks: [rows, n]."""
    return scale.repeat_interleave(TILE, dim=0)[:rows]


def _split(x: Tensor) -> list[Tensor]:
    """Views by tiles of the last dimension: the whole ones [..., tiles, 128], then a ragged one [..., 1, rest]."""
    whole = x.shape[-1] // TILE
    parts = [x[..., : whole * TILE].view(*x.shape[:-1], whole, TILE)]
    if whole * TILE < x.shape[-1]:
        parts.append(x[..., whole * TILE :].unsqueeze(-2))
    return parts


def tile_amax(values: Tensor) -> Tensor:
    """Largest magnitude per row and 128 channels: [..., N] -> [..., ceil(N / 128)]."""
    extremes = (part.aminmax(dim=-1) for part in _split(values))
    return torch.cat([torch.maximum(high, -low) for low, high in extremes], dim=-1)


def _block_amax(values: Tensor) -> Tensor:
    """Largest magnitude per 128 x 128 block: [M, N] -> [ceil(M / 128), ceil(N / 128)]."""
    return torch.cat([part.amax(dim=-1) for part in _split(tile_amax(values).T)], dim=-1).T


def _with_scales(values: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of `values` [..., N] by tiles, each with its part of `scale` [..., ceil(N / 128)] ready to broadcast."""
    start = 0
    for part in _split(values):
        stop = start + part.shape[-2]
        yield part, scale[..., start:stop, None]
        start = stop


def scale_tiles(values: Tensor, scale: Tensor) -> None:
    """Multiply each tile of `values` [..., N] in place by its scale [..., ceil(N / 128)]."""
    for tiles, factor in _with_scales(values, scale):
        tiles.mul_(factor)


def _store(payload: Tensor, values: Tensor, scale: Tensor) -> None:
    """payload = values / scale, tile by tile, rounded to the nearest code; `values` is overwritten."""
    for tiles, divisor in _with_scales(values, scale):
        tiles.div_(divisor)  # a true division: multiplying by a reciprocal would round twice
    payload.copy_(values.clamp_(-LARGEST_CODE, LARGEST_CODE))
