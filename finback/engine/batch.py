"""What one step of the engine computes, as tensors: which tokens at which positions, and where their cached rows lie."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHORT = 8  # tokens of a sequence up to which they are treated like decode rows: absorbed attention, batched with others


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence that go through the model together; everything before them is cached."""

    token_ids: Sequence[int]
    start: int  # position of the first of them
    block_table: Sequence[int]  # the sequence's blocks, in order, enough for all of these tokens


class Group(NamedTuple):
    """Chunks of equally many tokens: rows `first` to `end` of the packed batch, seen as [B, T]."""

    first: int
    end: int
    chunks: int  # B
    blocks: Tensor  # int64 [B, n]: the blocks that hold positions 0 to `length`; the first again where a sequence has no more
    length: int  # positions that the longest sequence sees
    positions: Tensor  # int64 [B, T]
    mask: Tensor | None  # bool [B, T, length], True where a query may look; None: long chunks with nothing before them, causal


class Packed(NamedTuple):
    """All tokens of a step one behind the other, in the order of `order`."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]: row of the flattened cache [blocks * block_size] that each token's own values go to
    groups: list[Group]
    order: list[int]  # the chunks' numbers as they were given
    first_rows: list[int]  # of each chunk, in `order`


def pack(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> Packed:
    """Chunks of equally many tokens are grouped, if they are short, or begin their sequences; others stand alone."""
    order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].token_ids), chunks[i].start > 0, i))
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    first_rows: list[int] = []
    members: list[list[int]] = []
    for number in order:
        token_ids, start, table = chunks[number]
        first_rows.append(len(input_ids))
        input_ids += token_ids
        for position in range(start, start + len(token_ids)):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
        before = chunks[members[-1][0]] if members else None
        same = before is not None and len(before.token_ids) == len(token_ids)
        if before is not None and same and (len(token_ids) <= SHORT or before.start == start == 0):
            members[-1].append(number)
        else:
            members.append([number])
    position_tensor = torch.tensor(positions, device=device)
    groups, first = [], 0
    for numbers in members:
        end = first + len(numbers) * len(chunks[numbers[0]].token_ids)
        groups.append(_group([chunks[i] for i in numbers], first, end, position_tensor[first:end], block_size))
        first = end
    return Packed(
        torch.tensor(input_ids, device=device), position_tensor, torch.tensor(slots, device=device), groups, order, first_rows
    )


def _group(chunks: list[Chunk], first: int, end: int, positions: Tensor, block_size: int) -> Group:
    tokens = len(chunks[0].token_ids)
    length = max(chunk.start for chunk in chunks) + tokens
    count = -(-length // block_size)
    # Filled up with a block of the sequence itself: what is masked counts 0 times, but in another's block that might be 0 times NaN.
    tables = [[*t[:count], *t[:1] * (count - len(t))] for t in (list(chunk.block_table) for chunk in chunks)]
    positions = positions.view(len(chunks), tokens)
    mask = None
    if tokens <= SHORT or chunks[0].start > 0:
        mask = torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)
    return Group(first, end, len(chunks), torch.tensor(tables, device=positions.device), length, positions, mask)
