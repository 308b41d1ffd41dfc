"""The trigram baseline: a distribution after any history, the numbers of a hand computation, and bits per byte."""

import math
from fractions import Fraction as F

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.ngram import SMALLEST_DISCOUNT, TrigramModel, bits_per_byte


@given(
    tokens=st.lists(st.integers(0, 4), min_size=3, max_size=60),
    first=st.integers(0, 5),
    second=st.integers(0, 5),
)
def test_probabilities_sum_to_one_and_none_is_zero(tokens: list[int], first: int, second: int) -> None:
    """After seen, half-seen and unseen histories alike; token 5 is never seen at all."""
    model = TrigramModel(np.array(tokens), 6)
    distribution = model.next_token_probabilities(first, second)
    assert distribution.sum() == pytest.approx(1, abs=1e-12)
    assert distribution.min() > 0


def test_hand_computed_example() -> None:
    """Tokens 0 1 0 1 0 2 over a vocabulary of 4; every number below is worked out from the formula on paper.

    Trigrams: 010 twice, 101 once, 102 once.   n1 = 2, n2 = 1 (n3, n4 = 0, taken as 1)
    Bigrams, number of different tokens before: 10 once (0), 01 once (1), 02 once (1).   n1 = 3
    Unigrams, number of different tokens before: 0 once (1), 1 once (0), 2 once (0).     n1 = 3
    """
    model = TrigramModel(np.array([0, 1, 0, 1, 0, 2]), 4)
    # Trigrams: Y = 2 / (2 + 2) = 1/2;  D1 = 1 - 2 Y n2/n1 = 1/2;  D2 = 2 - 3 Y n3/n2 = 1/2
    # Bigrams and unigrams: Y = 3 / (3 + 2) = 3/5;  D1 = 1 - 2 Y n2/n1 = 1 - 6/5 * 1/3 = 3/5
    unigram = {w: (F(2, 5) / 3 if w < 3 else 0) + F(3, 5) * F(1, 4) for w in range(4)}
    assert sum(unigram.values()) == 1
    # After 0 came 1 and 2, once each: shares (1 - 3/5) / 2, gamma 3/5.
    bigram_after_0 = {w: (F(1, 5) if w in (1, 2) else 0) + F(3, 5) * unigram[w] for w in range(4)}
    # After 1 0 came 1 and 2, once each: shares (1 - 1/2) / 2, gamma 1/2.
    after_1_0 = {w: (F(1, 4) if w in (1, 2) else 0) + F(1, 2) * bigram_after_0[w] for w in range(4)}
    # After 1 came 0 alone: share 2/5, gamma 3/5.  After 0 1 came 0 twice: share 3/2 / 2, gamma 1/4.
    bigram_after_1 = {w: (F(2, 5) if w == 0 else 0) + F(3, 5) * unigram[w] for w in range(4)}
    after_0_1 = {w: (F(3, 4) if w == 0 else 0) + F(1, 4) * bigram_after_1[w] for w in range(4)}
    for history, expected in (((1, 0), after_1_0), ((0, 1), after_0_1), ((3, 0), bigram_after_0), ((0, 3), unigram)):
        found = model.next_token_probabilities(*history)
        assert found == pytest.approx([float(expected[w]) for w in range(4)], abs=1e-15), history
    logs = model.log_probabilities(np.array([1, 0, 1, 0]))
    assert np.exp(logs) == pytest.approx([float(bigram_after_1[0]), float(after_1_0[1]), float(after_0_1[0])], abs=1e-15)


def test_log_probabilities_agree_with_the_distributions() -> None:
    random = np.random.default_rng(1)
    model = TrigramModel(random.integers(0, 9, 500), 10)
    text = random.integers(0, 10, 50)
    logs = model.log_probabilities(text)
    assert logs.shape == (49,)
    for i in range(2, 50):
        assert logs[i - 1] == pytest.approx(math.log(model.next_token_probabilities(int(text[i - 2]), int(text[i - 1]))[text[i]]))


def test_order_pays_where_the_text_has_it() -> None:
    """A second-order source, decided at 90% by the two tokens before: near its entropy, far below the unigram's."""
    random = np.random.default_rng(0)
    vocab_size, tokens = 12, [0, 1]
    rule = random.integers(0, vocab_size, (vocab_size, vocab_size))
    for _ in range(30_000):
        tokens.append(int(rule[tokens[-2], tokens[-1]]) if random.random() < 0.9 else int(random.integers(0, vocab_size)))
    train, test = np.array(tokens[:25_000]), np.array(tokens[25_000:])
    entropy = -(0.9 + 0.1 / 12) * math.log(0.9 + 0.1 / 12) - 11 * (0.1 / 12) * math.log(0.1 / 12)
    loss = -TrigramModel(train, vocab_size).log_probabilities(test).mean()
    frequencies = np.bincount(train, minlength=vocab_size) / len(train)
    unigram_loss = -np.log(frequencies[test]).mean()
    assert entropy * 0.9 < loss < entropy * 1.15
    assert loss < unigram_loss / 2


def test_text_without_rare_counts_keeps_every_token_possible() -> None:
    """Generated text repeats: no n-gram stands there once, where the published discounts are undefined."""
    model = TrigramModel(np.array([0, 1, 2] * 100), 4)
    after = model.next_token_probabilities(0, 1)
    assert after[2] > 0.99
    assert 0 < after[3] < SMALLEST_DISCOUNT


def test_bad_input_is_told() -> None:
    with pytest.raises(InputError, match="needs at least 3 tokens"):
        TrigramModel(np.array([1, 2]), 4)
    with pytest.raises(InputError, match="outside of vocab_size 4"):
        TrigramModel(np.array([1, 2, 4]), 4)
    with pytest.raises(InputError, match="vocab_size is 2097152"):
        TrigramModel(np.array([1, 2, 4]), 2**21)


def test_bits_per_byte_by_hand() -> None:
    """Tokens of 3, 2 and 0 bytes (an end of sentence), 10 ln 2 nats in all: 10 bits over 3 + 2 + 3 bytes."""
    lengths = np.array([0, 3, 2])
    assert bits_per_byte(10 * math.log(2), np.array([1, 2, 0, 1]), lengths) == pytest.approx(10 / 8, rel=1e-15)
    with pytest.raises(InputError, match="hold no text"):
        bits_per_byte(1.0, np.array([0, 0]), lengths)


def test_bits_per_byte_do_not_depend_on_the_cut_into_tokens() -> None:
    """The same bits over the same text, as one token of six bytes or as three of two."""
    one = bits_per_byte(5.0, np.array([0]), np.array([6, 2]))
    assert one == bits_per_byte(5.0, np.array([1, 1, 1]), np.array([6, 2]))
