"""Rows for pre-training and packed samples for fine-tuning."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.packing import Sample, pack_samples, pad_samples, row_count, row_slice


@given(st.integers(0, 500), st.integers(1, 60))
def test_rows_make_every_token_a_target_once(num_tokens: int, sequence_length: int) -> None:
    rows = [list(range(num_tokens))[row_slice(row, sequence_length)] for row in range(row_count(num_tokens, sequence_length))]
    assert all(len(row) == sequence_length + 1 for row in rows)
    targets = [token for row in rows for token in row[1:]]
    assert targets == list(range(1, len(targets) + 1))
    assert max(0, num_tokens - 1) - len(targets) < sequence_length  # less than one row is left out


SAMPLES = st.lists(st.integers(1, 20), max_size=30)


@given(SAMPLES, st.integers(20, 40))
def test_packed_samples_are_whole_and_apart(lengths: list[int], row_length: int) -> None:
    samples = [Sample(range(100 * i, 100 * i + n), [j % 2 == 1 for j in range(n)]) for i, n in enumerate(lengths)]
    packed = pack_samples(samples, row_length, pad_token_id=-7)
    found = []
    for ids, members, positions, mask in zip(
        packed.input_ids, packed.sample_ids, packed.position_ids, packed.loss_mask, strict=True
    ):
        for index in dict.fromkeys(members[members >= 0].tolist()):
            span = np.flatnonzero(members == index)
            assert (np.diff(span) == 1).all()  # one run
            assert ids[span].tolist() == list(samples[index].ids)
            assert positions[span].tolist() == list(range(len(span)))
            assert mask[span].tolist() == [False, *samples[index].loss_mask[1:]]
            found.append(index)
        padding = members == -1
        assert (ids[padding] == -7).all()
        assert not mask[padding].any()
    assert sorted(found) == list(range(len(samples)))
    assert packed.input_ids.shape == (len(packed.input_ids), row_length)


@given(SAMPLES)
def test_packing_is_tight(lengths: list[int]) -> None:
    samples = [Sample([0] * n, [True] * n) for n in lengths]
    rows = len(pack_samples(samples, 20, pad_token_id=0).input_ids)
    floor = -(-sum(lengths) // 20)
    assert floor <= rows <= max(floor, int(11 / 9 * _optimum_at_most(lengths)) + 1)


def _optimum_at_most(lengths: list[int]) -> int:
    # Next-fit needs at most twice the optimum; any packing found bounds the optimum from above.
    rows, room = 0, 0
    for length in sorted(lengths, reverse=True):
        if length > room:
            rows, room = rows + 1, 20
        room -= length
    return rows


def test_best_fit_takes_the_fullest_row() -> None:
    samples = [Sample([i] * n, [True] * n) for i, n in enumerate([6, 7, 3, 4])]
    packed = pack_samples(samples, 10, pad_token_id=9)
    assert packed.input_ids.tolist() == [[1] * 7 + [2] * 3, [0] * 6 + [3] * 4]


def test_bad_samples() -> None:
    with pytest.raises(InputError, match="3 ids and 2 mask values"):
        Sample([1, 2, 3], [True, False])
    with pytest.raises(InputError, match="0 ids"):
        Sample([], [])
    long = Sample(range(12), [True] * 12)
    with pytest.raises(InputError, match="sample 1 has 12 tokens, more than row_length 10"):
        pack_samples([Sample([1], [True]), long], 10, pad_token_id=0)
    assert pack_samples([long], 10, pad_token_id=0, truncate=True).input_ids.tolist() == [list(range(10))]
    assert pack_samples([], 10, pad_token_id=0).input_ids.shape == (0, 10)


@given(SAMPLES)
def test_padded_samples_keep_their_order_and_a_row_each(lengths: list[int]) -> None:
    samples = [Sample(range(100 * i, 100 * i + n), [j % 2 == 0 for j in range(n)]) for i, n in enumerate(lengths)]
    padded = pad_samples(samples, pad_token_id=-7)
    width = max(lengths, default=0)
    for name in ("input_ids", "sample_ids", "position_ids", "loss_mask"):
        assert getattr(padded, name).shape == (len(lengths), width)
    for index, n in enumerate(lengths):
        rest = width - n
        assert padded.input_ids[index].tolist() == [*samples[index].ids, *[-7] * rest]
        assert padded.sample_ids[index].tolist() == [index] * n + [-1] * rest
        assert padded.position_ids[index].tolist() == [*range(n), *[0] * rest]
        assert padded.loss_mask[index].tolist() == [False, *samples[index].loss_mask[1:], *[False] * rest]
