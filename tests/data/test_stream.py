"""The stream: every row once an epoch, exactly resumable, whatever the batches."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.config import DataConfig
from finback.data.shards import TokenShards, write_shards
from finback.data.sources import Document
from finback.data.stream import TokenStream, permute
from finback.data.tokenizer import Tokenizer

CONFIG = DataConfig(validation_fraction=0.1, fim_rate=0, boundary_split_rate=0, tokens_per_shard=2000)
LENGTH = 24


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> list[TokenShards]:
    """Two shard directories of different sizes."""
    found = []
    for name, part in (("a", documents[:60]), ("b", documents[60:80])):
        directory = tmp_path_factory.mktemp(name)
        write_shards(part, tokenizer, directory, CONFIG)
        found.append(TokenShards(directory))
    return found


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 50))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = [permute(position, size, key=(seed, 0, epoch)) for position in range(size)]
    assert sorted(order) == list(range(size))


def test_permute_shuffles() -> None:
    size = 4096
    orders = [
        [permute(position, size, key=(seed, epoch)) for position in range(size)] for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    for order in orders:
        assert sum(position == row for position, row in enumerate(order)) < 10  # 1 is expected
        assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 12  # 2 are expected
        mean = sum(order[: size // 2]) / (size // 2)
        assert abs(mean - size / 2) < 100  # 18 is one standard deviation
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert sum(a == b for a, b in zip(orders[first], orders[second], strict=True)) < 10
    # Pinned: a change of this order would change what a resumed run reads.
    assert orders[0][:5] == [221, 2311, 3513, 1072, 3462]
    with pytest.raises(IndexError):
        permute(5, 5, key=(0,))


def test_every_epoch_visits_every_row_once(shards: list[TokenShards]) -> None:
    stream = TokenStream(shards[0], LENGTH, seed=5)
    (rows,) = stream.rows_per_epoch
    everything = shards[0].rows(range(rows), LENGTH)
    expected = Counter(map(tuple, everything.tolist()))
    epochs = [stream.next_batch(rows) for _ in range(3)]
    for epoch in epochs:
        assert epoch.shape == (rows, LENGTH + 1)
        assert epoch.dtype == torch.long
        assert Counter(map(tuple, epoch.tolist())) == expected
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.from_numpy(everything))
    other = TokenStream(shards[0], LENGTH, seed=6).next_batch(rows)
    assert not torch.equal(epochs[0], other)


@given(st.data(), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.lists(st.integers(1, 40), max_size=6))
def test_resuming_anywhere_goes_on_with_the_next_row(
    shards: list[TokenShards], data: st.DataObject, before: list[int], after: list[int]
) -> None:
    weights = data.draw(st.sampled_from([None, [3, 1], [0.2, 0.9]]))
    whole = TokenStream(shards, LENGTH, seed=2, weights=weights).next_batch(sum(before) + sum(after) + 1)
    stream = TokenStream(shards, LENGTH, seed=2, weights=weights)
    parts = [stream.next_batch(n) for n in before]  # batches of any sizes
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = TokenStream(shards, LENGTH, seed=2, weights=weights)
    resumed.load_state_dict(state)
    parts += [resumed.next_batch(n) for n in [*after, 1]]
    assert torch.equal(torch.cat(parts), whole)
    skipped = TokenStream(shards, LENGTH, seed=2, weights=weights)
    skipped.skip(sum(before))
    assert skipped.state_dict() == state


def test_mixture_keeps_its_shares(shards: list[TokenShards]) -> None:
    stream = TokenStream(shards, LENGTH, weights=[3, 1])
    for taken in range(1, 200):
        stream.skip(1)
        first, second = stream.rows_taken
        assert first + second == taken
        assert abs(first - 0.75 * taken) <= 1
    assert TokenStream(shards, LENGTH).weights == [1, 1]


def test_rows_hold_no_validation_document(shards: list[TokenShards], tokenizer: Tokenizer) -> None:
    validation = TokenShards(shards[0].directory, "validation")
    stream = TokenStream(shards[0], LENGTH)
    text = tokenizer.decode(shards[0].tokens(0, shards[0].num_tokens).tolist())
    assert validation.num_documents > 0
    for number in range(validation.num_documents):
        assert tokenizer.decode(validation.document(number).tolist()) not in text
    assert TokenStream(validation, 8).rows_per_epoch[0] > 0
    assert stream.rows_per_epoch[0] == (shards[0].num_tokens - 1) // LENGTH


def test_mistakes(shards: list[TokenShards], tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = TokenStream(shards, LENGTH, seed=1)
    for other, name in (
        (TokenStream(shards, LENGTH, seed=2), "seed"),
        (TokenStream(shards, LENGTH + 1, seed=1), "sequence_length"),
        (TokenStream(shards, LENGTH, seed=1, weights=[2, 1]), "weights"),
        (TokenStream(shards[::-1], LENGTH, seed=1), "shards"),
    ):
        with pytest.raises(InputError, match=f"position has {name}"):
            other.load_state_dict(stream.state_dict())
    with pytest.raises(InputError, match="too few for one row of sequence_length 1000000"):
        TokenStream(shards, 1_000_000)
    with pytest.raises(InputError, match="sequence_length is 0"):
        TokenStream(shards, 0)
    with pytest.raises(InputError, match="at least one shard directory"):
        TokenStream([], 8)
    with pytest.raises(InputError, match="one positive number for each of 2"):
        TokenStream(shards, 8, weights=[1])
    with pytest.raises(InputError, match="one positive number"):
        TokenStream(shards, 8, weights=[1, 0])
    with pytest.raises(InputError, match="a batch has 0 rows"):
        stream.next_batch(0)
    from finback.data.tokenizer import train_tokenizer

    write_shards([Document("other text " * 50, "x")], train_tokenizer(["other"], 276), tmp_path, CONFIG)
    with pytest.raises(InputError, match="different tokenizers"):
        TokenStream([shards[0], TokenShards(tmp_path)], 8)
