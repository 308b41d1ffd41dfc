"""MLA's absorbed decoding in Triton, over a paged latent cache; prefill and training are in `causal_attention`.

Every head attends to the same cached row, so one tile of rows serves all heads of a program: it is read once and used twice,
for the scores and, its first C values, as values. Long contexts are split over programs; each leaves its part of the sum with the
logarithm of its weight, and a second kernel joins them. The floor is reading each row of the cache once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.fp8 import TILE
from finback.ops.triton.cast import dot, rounded

_LOWEST = tl.constexpr(float("-inf"))
_ROWS_PER_SPLIT = 512


@triton.jit
def latent_decode_kernel(
    query, latents, rope_keys, scales, block_table, lengths, part, log_weight,
    heads, blocks_per_row, latent_stride, rope_stride, scale, splits,
    rank: tl.constexpr, rope: tl.constexpr, block_size: tl.constexpr, block_h: tl.constexpr, block_s: tl.constexpr,
    compressed: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """One part of the context of one sequence for block_h heads: part float32 [B, heads, splits, rank], log_weight [B, heads, splits].

    Rows of the cache are `latents` [., latent_stride] and `rope_keys` [., rope_stride], both at the slot block * block_size + row. With
    `compressed`, latents are E4M3 with a float32 scale for each `tile` values, `scales` [., rank / tile].
    """
    sequence, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * block_h + tl.arange(0, block_h)
    c, r = tl.arange(0, rank), tl.arange(0, rope)
    length = tl.load(lengths + sequence)
    per_split = tl.cdiv(tl.cdiv(length, splits), block_s) * block_s
    start, end = split * per_split, tl.minimum(length, (split + 1) * per_split)
    row = (sequence * heads + head[:, None]).to(tl.int64) * (rank + rope)
    inside = head[:, None] < heads
    latent_query = tl.load(query + row + c[None, :], mask=inside, other=0.0)
    rope_query = tl.load(query + row + rank + r[None, :], mask=inside, other=0.0)
    largest = tl.full((block_h,), float("-inf"), tl.float32)
    weight = tl.zeros((block_h,), tl.float32)
    total = tl.zeros((block_h, rank), tl.float32)
    for first in range(start, end, block_s):
        place = first + tl.arange(0, block_s)
        valid = place < end
        block = tl.load(block_table + sequence * blocks_per_row + place // block_size, mask=valid, other=0)
        slot = block.to(tl.int64) * block_size + place % block_size
        latent = tl.load(latents + slot[:, None] * latent_stride + c[None, :], mask=valid[:, None], other=0.0)
        if compressed:
            factor = tl.load(scales + slot[:, None] * (rank // tile) + c[None, :] // tile, mask=valid[:, None], other=0.0)
            latent = rounded(latent.to(tl.float32) * factor, latent_query.dtype)
        rope_key = tl.load(rope_keys + slot[:, None] * rope_stride + r[None, :], mask=valid[:, None], other=0.0)
        scores = dot(latent_query, tl.trans(latent)) + dot(rope_query, tl.trans(rope_key))
        scores = tl.where(valid[None, :], scores * scale, _LOWEST)
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - higher)
        powers = tl.exp(scores - higher[:, None])
        weight = weight * shrink + tl.sum(powers, 1)
        total = total * shrink[:, None] + dot(rounded(powers, latent.dtype), latent)
        largest = higher
    empty = weight == 0.0
    place_out = (sequence * heads + head) * splits + split
    tl.store(
        part + place_out[:, None].to(tl.int64) * rank + c[None, :], total / tl.where(empty, 1.0, weight)[:, None], mask=inside
    )
    tl.store(log_weight + place_out, tl.where(empty, _LOWEST, largest + tl.log(tl.where(empty, 1.0, weight))), mask=head < heads)


@triton.jit
def join_kernel(part, log_weight, out, splits, rank: tl.constexpr, width: tl.constexpr):
    """out [rows, rank]: the parts [rows, splits, rank] weighted by exp(log_weight [rows, splits])."""
    row = tl.program_id(0).to(tl.int64)
    split, c = tl.arange(0, width), tl.arange(0, rank)
    logs = tl.load(log_weight + row * splits + split, mask=split < splits, other=_LOWEST)
    weights = tl.exp(logs - tl.max(logs, 0))
    weights = weights / tl.sum(weights, 0)
    parts = tl.load(part + (row * splits + split[:, None]) * rank + c[None, :], mask=split[:, None] < splits, other=0.0)
    tl.store(out + row * rank + c, rounded(tl.sum(parts * weights[:, None], 0), out.dtype.element_ty))


def latent_decode(
    query: Tensor, cache: Tensor, block_table: Tensor, lengths: Tensor, rank: int, scale: float, splits: int | None = None
) -> Tensor:
    """Absorbed attention of one token per sequence over its pages.

    query [B, H, C + R]; cache [blocks, block_size, C + R]; block_table int32 [B, .] and lengths int32 [B] say which rows are whose ->
    [B, H, C]. C = `rank` and R must be powers of two of at least 16. As `finback.ops.attention.latent_attention` over those rows.
    """
    rows = cache.view(-1, cache.shape[-1])
    return _decode(query, rows, rows[:, rank:], rows, block_table, lengths, cache.shape[1], rank, scale, splits, False)


def latent_decode_fp8(
    query: Tensor, latents: Tensor, scales: Tensor, rope_keys: Tensor, block_table: Tensor, lengths: Tensor, scale: float,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """The same over a compressed cache: latents E4M3 [blocks, block_size, C], scales float32 [blocks, block_size, C / 128] and rotated
    keys [blocks, block_size, R] in query's dtype: C + 4 C / 128 + 2 R bytes a row, 656 at V3's sizes."""
    rank = latents.shape[-1]
    if rank % TILE or scales.shape[-1] != rank // TILE:
        raise ValueError(f"a compressed latent of {rank} values needs {rank / TILE:g} scales a row, not {scales.shape[-1]}")
    flat = latents.view(-1, rank), rope_keys.view(-1, rope_keys.shape[-1]), scales.contiguous()
    return _decode(query, *flat, block_table, lengths, latents.shape[1], rank, scale, splits, True)


def _decode(
    query: Tensor, latents: Tensor, rope_keys: Tensor, scales: Tensor, block_table: Tensor, lengths: Tensor, block_size: int, rank: int,
    scale: float, splits: int | None, compressed: bool,
) -> Tensor:  # fmt: skip
    batch, heads, width = query.shape
    rope = width - rank
    for name, size in (("latent", rank), ("rotary part", rope)):
        if size < 16 or triton.next_power_of_2(size) != size:
            raise ValueError(
                f"the decode kernel needs a {name} of a power of two of at least 16 values, not {size}; use latent_attention"
            )
    if splits is None:
        splits = max(1, min(32, block_table.shape[1] * block_size // _ROWS_PER_SPLIT))
    block_h = 16 if heads <= 16 else 64
    part = torch.empty(batch, heads, splits, rank, dtype=torch.float32, device=query.device)
    log_weight = torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, rank, dtype=query.dtype, device=query.device)
    latent_decode_kernel[(batch, triton.cdiv(heads, block_h), splits)](
        query.contiguous(), latents, rope_keys, scales, block_table, lengths, part, log_weight, heads, block_table.shape[1],
        latents.stride(0), rope_keys.stride(0), scale, splits, rank=rank, rope=rope, block_size=block_size, block_h=block_h, block_s=64,
        compressed=compressed, tile=TILE, num_warps=4 if heads <= 16 else 8, num_stages=2,
    )  # fmt: skip
    join_kernel[(batch * heads,)](part, log_weight, out, splits, rank, triton.next_power_of_2(splits))
    return out
