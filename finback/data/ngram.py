"""A strong model of the old kind to be measured against: the interpolated trigram with modified Kneser-Ney smoothing.

Chen and Goodman (1998, "An empirical study of smoothing techniques for language modeling", sections 3 and 5) found it
the best of the trigram models; on our own corpora it beats a Jelinek-Mercer trigram with tuned weights. In full, for
the orders n = 3, 2, 1, with the history h of n - 1 tokens, and h' the history without its oldest token:

    P_n(w | h) = max(c_n(h w) - D_n(c_n(h w)), 0) / c_n(h)  +  gamma_n(h) P_{n-1}(w | h'),      P_0(w) = 1 / vocab_size
    gamma_n(h) = (D_n(1) N1(h) + D_n(2) N2(h) + D_n(3) N3+(h)) / c_n(h)                what the discounts set free

c_3 counts occurrences. c_2 and c_1 count how many different tokens stood before the bigram or unigram among the entries
of the next higher order. N1, N2 and N3+ count the continuations of h seen once, twice, three times or more; c_n(h) is
the sum of c_n(h w) over w. A history that was never seen leaves all to the lower order (gamma = 1).

    D_n(k) = k - (k + 1) Y n_{k+1} / n_k,    Y = n_1 / (n_1 + 2 n_2),    n_k = number of entries of order n with count k

and D_n(k) for counts above 3 as for 3. In small or generated text an n_k can be 0, where the formula says nothing: n_k
is then taken as 1, and no discount is below SMALLEST_DISCOUNT, so that every token keeps a probability.
"""

import math
from dataclasses import dataclass

import numpy as np

from finback.config import InputError

SMALLEST_DISCOUNT = 0.05
_MAX_DISCOUNTED = 3


@dataclass(frozen=True)
class _Order:
    """One order of the model as two sorted tables: the discounted share of each n-gram, and gamma of each history.

    An n-gram is one integer, its tokens read as digits in base vocab_size; its history is that integer // vocab_size.
    """

    grams: np.ndarray
    shares: np.ndarray
    histories: np.ndarray
    gammas: np.ndarray


class TrigramModel:
    """Probabilities of the next token from the two before it; see the module's docstring for the formula."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Count `tokens`, integers [N] in 0 .. vocab_size - 1, N at least 3, documents one after another.

        Raises InputError for fewer tokens, ids out of range, or a vocabulary whose trigrams do not fit into 63 bits.
        """
        if vocab_size < 1 or vocab_size**3 > 2**63 - 1:
            raise InputError(f"vocab_size is {vocab_size}, a trigram model takes 1 to {2**21 - 1}")
        if len(tokens) < 3:
            raise InputError(f"a trigram model needs at least 3 tokens to count, there are {len(tokens)}")
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise InputError(f"token ids reach from {tokens.min()} to {tokens.max()}, outside of vocab_size {vocab_size}")
        self.vocab_size = vocab_size
        trigrams, counts = np.unique((tokens[:-2] * vocab_size + tokens[1:-1]) * vocab_size + tokens[2:], return_counts=True)
        bigrams, bigram_counts = np.unique(trigrams % vocab_size**2, return_counts=True)
        unigrams, unigram_counts = np.unique(bigrams % vocab_size, return_counts=True)
        self._orders = [
            _discounted(unigrams, unigram_counts, vocab_size),
            _discounted(bigrams, bigram_counts, vocab_size),
            _discounted(trigrams, counts, vocab_size),
        ]

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [N - 1], natural logarithms: each token but the first, given the two before it (or the one)."""
        tokens = np.asarray(tokens, dtype=np.int64)
        if len(tokens) < 2:
            return np.zeros(0)
        before = tokens[:-1]
        lower = self._bigram(before, tokens[1:])
        full = self._apply(2, before[:-1] * self.vocab_size + before[1:], tokens[2:], lower[1:])
        logarithms: np.ndarray = np.log(np.concatenate([lower[:1], full]))
        return logarithms

    def next_token_probabilities(self, first: int, second: int) -> np.ndarray:
        """float64 [vocab_size]: the distribution after the tokens `first`, `second`."""
        every = np.arange(self.vocab_size)
        lower = self._bigram(np.full_like(every, second), every)
        return self._apply(2, np.full_like(every, first * self.vocab_size + second), every, lower)

    def _bigram(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        uniform = np.full(len(tokens), 1 / self.vocab_size)
        return self._apply(1, before, tokens, self._apply(0, np.zeros_like(tokens), tokens, uniform))

    def _apply(self, order: int, histories: np.ndarray, tokens: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P_n from P_{n-1}: one step of the formula for all positions at once."""
        table = self._orders[order]
        share = _look_up(table.grams, table.shares, histories * self.vocab_size + tokens, 0.0)
        gamma = _look_up(table.histories, table.gammas, histories, 1.0)
        interpolated: np.ndarray = share + gamma * lower
        return interpolated


def bits_per_byte(nats: float, targets: np.ndarray, byte_lengths: np.ndarray) -> float:
    """Total loss of `targets` in nats -> bits per byte of the UTF-8 text they stand for.

    `byte_lengths` [vocab_size] is `Tokenizer.token_byte_lengths()`: tokens that are no text count no bytes, though
    predicting them costs bits. Raises InputError if the targets hold no text.
    """
    text_bytes = int(byte_lengths[targets].sum())
    if text_bytes == 0:
        raise InputError("the held-out tokens hold no text, so bits per byte are undefined; hold out more documents")
    return nats / math.log(2) / text_bytes


def _discounted(grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
    discounts = _discounts(counts)
    histories, history_of = np.unique(grams // vocab_size, return_inverse=True)
    totals = np.bincount(history_of, weights=counts)
    freed = discounts[np.minimum(counts, _MAX_DISCOUNTED)]
    return _Order(
        grams=grams,
        shares=(counts - freed) / totals[history_of],
        histories=histories,
        gammas=np.bincount(history_of, weights=freed) / totals,
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0 .. 3) of one order; D(0) = 0 is never used. D(k) <= k always, so no share is negative."""
    of_count = np.maximum(np.bincount(np.minimum(counts, _MAX_DISCOUNTED + 2), minlength=_MAX_DISCOUNTED + 2), 1)
    y = of_count[1] / (of_count[1] + 2 * of_count[2])
    values = [k - (k + 1) * y * of_count[k + 1] / of_count[k] for k in range(1, _MAX_DISCOUNTED + 1)]
    return np.array([0.0, *(max(value, SMALLEST_DISCOUNT) for value in values)])


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], default)
