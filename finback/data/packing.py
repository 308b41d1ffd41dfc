"""Rows of fixed length: cut from concatenated documents for pre-training, filled with whole samples for fine-tuning."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finback.config import InputError


def row_count(num_tokens: int, sequence_length: int) -> int:
    """Rows of `sequence_length` inputs in `num_tokens` concatenated tokens; the remainder is left out."""
    return max(0, (num_tokens - 1) // sequence_length)


def row_slice(row: int, sequence_length: int) -> slice:
    """Where row `row` lies: T + 1 tokens, so that T inputs have T targets.

    Neighbours share one token, so each token but the first is a target exactly once. Documents are concatenated with
    their begin and end tokens and rows cut without regard to them: no mask between documents, as in V3 section 4.1.
    """
    return slice(row * sequence_length, (row + 1) * sequence_length + 1)


@dataclass(frozen=True)
class Sample:
    """One fine-tuning sample: token ids, and which of them the loss is taken on (True where the token is to be
    learnt)."""

    ids: Sequence[int]
    loss_mask: Sequence[bool]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.loss_mask) or not self.ids:
            raise InputError(
                f"a sample has {len(self.ids)} ids and {len(self.loss_mask)} mask values; they must be equal and not 0"
            )


@dataclass(frozen=True)
class PackedSamples:
    """Samples packed into rows; all arrays are [B, row_length].

    `sample_ids` numbers the samples by their index in the input, -1 on padding: a position may see an earlier one only
    where the ids are equal. `position_ids` start at 0 in every sample. `loss_mask` is False on padding and on the
    first token of every sample, which has no predecessor.
    """

    input_ids: np.ndarray
    sample_ids: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray


def pack_samples(samples: Sequence[Sample], row_length: int, *, pad_token_id: int, truncate: bool = False) -> PackedSamples:
    """Pack whole samples into as few rows as best-fit decreasing finds, to be masked from each other (V3 section 5.1).

    The longest sample goes first, each into the fullest row that still holds it. A sample longer than `row_length` is
    an InputError, or is cut at its end with `truncate`. Deterministic: samples of equal length keep their order.
    """
    lengths = [min(len(sample.ids), row_length) for sample in samples]
    for index, sample in enumerate(samples):
        if len(sample.ids) > row_length and not truncate:
            raise InputError(
                f"sample {index} has {len(sample.ids)} tokens, more than row_length {row_length}; raise it or truncate"
            )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(samples)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        free, row = room.pop(place) if place < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    shape = (len(rows), row_length)
    packed = PackedSamples(
        input_ids=np.full(shape, pad_token_id, dtype=np.int64),
        sample_ids=np.full(shape, -1, dtype=np.int64),
        position_ids=np.zeros(shape, dtype=np.int64),
        loss_mask=np.zeros(shape, dtype=np.bool_),
    )
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            span = slice(start, start + lengths[index])
            packed.input_ids[row, span] = samples[index].ids[: lengths[index]]
            packed.sample_ids[row, span] = index
            packed.position_ids[row, span] = np.arange(lengths[index])
            packed.loss_mask[row, span] = samples[index].loss_mask[: lengths[index]]
            packed.loss_mask[row, start] = False
            start = span.stop
    return packed


def pad_samples(samples: Sequence[Sample], pad_token_id: int) -> PackedSamples:
    """One sample to a row, in the order given, padded at the end to the longest: what attention needs no mask for, since it is causal.

    Rows of like lengths waste little: sort before cutting into batches.
    """
    width = max((len(sample.ids) for sample in samples), default=0)
    shape = (len(samples), width)
    padded = PackedSamples(
        input_ids=np.full(shape, pad_token_id, dtype=np.int64),
        sample_ids=np.full(shape, -1, dtype=np.int64),
        position_ids=np.zeros(shape, dtype=np.int64),
        loss_mask=np.zeros(shape, dtype=np.bool_),
    )
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        padded.input_ids[row, :length] = sample.ids
        padded.sample_ids[row, :length] = row
        padded.position_ids[row, :length] = np.arange(length)
        padded.loss_mask[row, :length] = sample.loss_mask
        padded.loss_mask[row, 0] = False
    return padded
