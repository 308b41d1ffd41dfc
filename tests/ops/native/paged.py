"""Cached rows of several sequences in shuffled blocks, and what attention to them needs."""

from typing import NamedTuple

import torch
from torch import Tensor

from finback.ops.native.calls import LatentRows
from tests.ops.native.rule import draw


class Cache(NamedTuple):
    """Query token i looks at positions 0 to positions[i] of the blocks in blocks[i]. Rows behind them hold nan."""

    rows: Tensor  # [blocks, block_rows, width]
    positions: Tensor  # int64 [B]
    blocks: Tensor | None  # int32 [B, n]

    def latents(self) -> LatentRows:
        return LatentRows(*self)

    def slot(self, token: int, position: int) -> tuple[int, int]:
        if self.blocks is None:
            return token, position
        return int(self.blocks[token, position // self.rows.shape[1]]), position % self.rows.shape[1]

    def visible(self, token: int) -> Tensor:
        """The rows that one query token looks at, in order: [positions + 1, width]."""
        of_token = torch.tensor([token]) if self.blocks is None else self.blocks[token].long()
        return self.rows[of_token].flatten(0, 1)[: int(self.positions[token]) + 1]

    def with_new_rows(self, new: Tensor) -> "Cache":
        """The same cache in the dtype of `new` [B, width], with each token's row written."""
        rows = self.rows.to(new.dtype)
        for token, position in enumerate(self.positions.tolist()):
            rows[self.slot(token, position)] = new[token]
        return self._replace(rows=rows)


def draw_cache(dtype: torch.dtype, lengths: list[int], width: int, block_rows: int, new: int = 1, paged: bool = True) -> Cache:
    """`new` query tokens for each sequence, the last of them at its last position; one block per sequence unless `paged`."""
    if not paged:
        assert new == 1
        rows = torch.full((len(lengths), block_rows, width), float("nan"), dtype=dtype)
        for sequence, length in enumerate(lengths):
            rows[sequence, :length] = draw(dtype, length, width)
        return Cache(rows, torch.tensor(lengths) - 1, None)
    needed = [-(-length // block_rows) for length in lengths]
    order = torch.randperm(sum(needed) + 3).tolist()
    rows = torch.full((len(order), block_rows, width), float("nan"), dtype=dtype)
    tables, positions = [], []
    for length, count in zip(lengths, needed, strict=True):
        table = [order.pop() for _ in range(count)]
        for position in range(length):
            rows[table[position // block_rows], position % block_rows] = draw(dtype, width)
        for token in range(new):
            tables.append(table + [-1] * (max(needed) - count))  # what is behind the last block is never read
            positions.append(length - new + token)
    return Cache(rows, torch.tensor(positions), torch.tensor(tables, dtype=torch.int32))
