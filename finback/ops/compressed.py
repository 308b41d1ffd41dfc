"""A compressed row of the cache: 8-bit codes with one float32 scale for each tile of a token's values, taken when the row is written.

MLA: the latent C in tiles of 128 where they divide it, else in one, and the R rotated values kept in bfloat16, for position is the part
that rounding hurts most: C + 4 C / 128 + 2 R bytes, 656 at V3's sizes against 1,152. GQA: keys and values of all heads, in tiles of
whole heads of at least 64 values where there are as many.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finback.config import ModelConfig
from finback.ops.fp8 import FP8, LARGEST_CODE

CodeFormat = Literal["int8", "fp8"]

_LATENT_TILE = 128
_SMALLEST_TILE = 64  # of keys and values: 4 bytes of scale on 64 are 46.9% less than bfloat16
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CompressedRows:
    """How rows [..., coded + kept] are stored: codes, then scales, then the kept values, as bytes [..., row_bytes]."""

    format: CodeFormat
    coded: int
    """Values that are coded, a multiple of `tile`."""
    tile: int
    """Values that share a scale."""
    kept: int
    """Values after the coded ones that are kept in bfloat16."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.coded + 4 * (self.coded // self.tile) + 2 * self.kept

    def encode(self, rows: Tensor) -> Tensor:
        """Rows [..., coded + kept] of any float dtype as bytes, uint8 [..., row_bytes].

        A tile of zeros stays zeros; one that holds inf or nan comes back without a finite value.
        """
        values = rows[..., : self.coded].float().unflatten(-1, (-1, self.tile))
        largest = 127.0 if self.format == "int8" else LARGEST_CODE
        scale = (values.abs().amax(-1) / largest).clamp_min(_SMALLEST_SCALE)
        quotients = values / scale.unsqueeze(-1)
        if self.format == "int8":
            codes = quotients.round().clamp(-127, 127).to(torch.int8)
        else:
            codes = quotients.clamp(-LARGEST_CODE, LARGEST_CODE).to(FP8)
        kept = rows[..., self.coded :].to(torch.bfloat16).contiguous()
        return torch.cat((codes.flatten(-2).view(torch.uint8), scale.view(torch.uint8), kept.view(torch.uint8)), dim=-1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """What bytes uint8 [..., row_bytes] stand for: rows [..., coded + kept] in `dtype`, each rounded once."""
        codes, scale, kept = stored.split([self.coded, 4 * (self.coded // self.tile), 2 * self.kept], dim=-1)
        code_dtype = torch.int8 if self.format == "int8" else FP8
        values = codes.view(code_dtype).float().unflatten(-1, (-1, self.tile))
        values = values * _aligned(scale).view(torch.float32).unsqueeze(-1)
        coded: Tensor = values.flatten(-2).to(dtype)
        if not self.kept:  # torch does not view no bytes as wider numbers
            return coded
        return torch.cat((coded, _aligned(kept).view(torch.bfloat16).to(dtype)), dim=-1)


def compressed_rows(config: ModelConfig, format: CodeFormat) -> CompressedRows:
    """The layout of `config`'s rows: the latent's, or that of keys and values."""
    if config.kv_lora_rank:
        rank = config.kv_lora_rank
        return CompressedRows(format, rank, rank if rank % _LATENT_TILE else _LATENT_TILE, config.qk_rope_head_dim)
    heads, size = config.num_key_value_heads, config.head_dim
    together = next((n for n in range(1, heads) if heads % n == 0 and n * size >= _SMALLEST_TILE), heads)
    return CompressedRows(format, 2 * heads * size, together * size, 0)


def _aligned(part: Tensor) -> Tensor:
    """A packed copy: a view as wider numbers wants them to start, and rows to follow, at multiples of their size."""
    return part.clone(memory_format=torch.contiguous_format)
