"""A shuffled, resumable stream of packed rows over one or several shard directories.

Nothing is drawn from a random state that has to be kept: row k of an epoch is `permute(k)`, a keyed bijection of the
row numbers, and the mixture picks the directory that lags furthest behind its share. So the position is one count per
directory, a resumed stream continues with exactly the row that would have come next, and the batch size may change at
any time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from finback.config import InputError
from finback.data.packing import row_count, row_slice
from finback.data.shards import TokenShards

_ROUNDS = 6


class TokenStream:
    """Endless rows of T + 1 tokens; every epoch of a directory visits each of its rows once, in an order of its own.

    `weights` are the shares of rows taken from each directory (equal unless given). The sequence of rows depends on
    the shards, `sequence_length`, `seed` and `weights` only, not on how it is cut into batches.
    """

    def __init__(
        self,
        shards: TokenShards | Sequence[TokenShards],
        sequence_length: int,
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.shards = [shards] if isinstance(shards, TokenShards) else list(shards)
        self.sequence_length = sequence_length
        self.seed = seed
        self.weights = [1.0] * len(self.shards) if weights is None else [float(weight) for weight in weights]
        if sequence_length < 1:
            raise InputError(f"sequence_length is {sequence_length}, it must be positive")
        if not self.shards:
            raise InputError("a token stream needs at least one shard directory")
        if len(self.weights) != len(self.shards) or not all(0 < weight < float("inf") for weight in self.weights):
            raise InputError(
                f"weights are {self.weights}; give one positive number for each of {len(self.shards)} shard directories"
            )
        if len({shard.tokenizer_sha256 for shard in self.shards}) > 1:
            raise InputError("the shard directories were written with different tokenizers; write them again with one")
        self.rows_per_epoch = [row_count(shard.num_tokens, sequence_length) for shard in self.shards]
        for shard, rows in zip(self.shards, self.rows_per_epoch, strict=True):
            if rows == 0:
                raise InputError(
                    f"{shard.directory} has {shard.num_tokens} {shard.split} tokens, too few for one row of "
                    f"sequence_length {sequence_length}; lower it or add text"
                )
        self._taken = [0] * len(self.shards)

    @property
    def rows_taken(self) -> list[int]:
        """Rows delivered so far from each directory; divide by `rows_per_epoch` for epochs."""
        return list(self._taken)

    def next_batch(self, n: int) -> Int64[Tensor, "rows length"]:
        """The next `n` rows, LongTensor [n, T + 1]: inputs are [:, :-1], targets [:, 1:]."""
        if n < 1:
            raise InputError(f"a batch has {n} rows, it must have at least 1")
        rows = [self._next_row() for _ in range(n)]
        return torch.from_numpy(np.stack(rows))

    def skip(self, n: int) -> None:
        """Advance by `n` rows without reading them."""
        for _ in range(n):
            self._taken[self._choose()] += 1

    def _next_row(self) -> np.ndarray:
        source = self._choose()
        epoch, position = divmod(self._taken[source], self.rows_per_epoch[source])
        self._taken[source] += 1
        row = permute(position, self.rows_per_epoch[source], key=(self.seed, source, epoch))
        piece = row_slice(row, self.sequence_length)
        return self.shards[source].tokens(piece.start, piece.stop)

    def _choose(self) -> int:
        if len(self.shards) == 1:
            return 0
        total, following = sum(self.weights), sum(self._taken) + 1
        lags = [weight / total * following - taken for weight, taken in zip(self.weights, self._taken, strict=True)]
        return lags.index(max(lags))

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {
            "taken": list(self._taken),
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "weights": list(self.weights),
            "shards": [shard.fingerprint for shard in self.shards],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; InputError if it belongs to other shards or settings, because the rows would not be
        the same."""
        own = self.state_dict()
        for name in ("seed", "sequence_length", "weights", "shards"):
            if state.get(name) != own[name]:
                raise InputError(
                    f"the saved stream position has {name} {state.get(name)!r}, this stream has {own[name]!r}; "
                    "resume with the same data and fields"
                )
        self._taken = [int(count) for count in state["taken"]]


def permute(position: int, size: int, *, key: tuple[int, ...]) -> int:
    """The number in 0 .. size - 1 that stands at `position` in the shuffle named by `key`.

    A Feistel network over the next even power of two, walked until it falls below `size`: a bijection computed in
    place, so a shuffle of billions of rows needs no memory, and the same in every version of every library.
    """
    if not 0 <= position < size:
        raise IndexError(f"position {position} lies outside of 0..{size - 1}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    seed = 0
    for part in key:
        seed = _mix(seed ^ (part & _WORD))
    value = position
    while True:
        left, right = value >> half, value & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(seed + right * _ROUNDS + number) & mask)
        value = (left << half) | right
        if value < size:
            return value


_WORD = 2**64 - 1


def _mix(value: int) -> int:
    """splitmix64: 64 bits in, 64 well mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)
