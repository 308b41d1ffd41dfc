"""Preference pairs from a judge (R1 in Nature, Methods): random order, repeated judging, clear cases only, lengths balanced.

A judge is any function `(prompt, a, b) -> float`: by how much it thinks a better than b. `finback.data.judge` has one that asks a
server, a rule makes another. What cannot be judged raises `JudgeError`, and is counted.
"""

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from finback.config import InputError
from finback.data.files import write_atomic

Judge = Callable[[str, str, str], float]


class JudgeError(Exception):
    """A judge has given no usable judgement."""


@dataclass(frozen=True)
class Candidates:
    """A prompt and responses to it, two or more."""

    prompt: str
    responses: Sequence[str]


@dataclass(frozen=True)
class Preference:
    """A pair that was judged: `chosen` is better than `rejected` by `delta`, the mean over all judgements."""

    prompt: str
    chosen: str
    rejected: str
    delta: float


@dataclass(frozen=True)
class Funnel:
    """What became of the pairs, stage by stage."""

    pairs: int
    """Pairs of different responses that were formed."""
    failed: int
    """Of these, those on which a judgement failed."""
    unclear: int
    """Those whose difference was too small."""
    unbalanced: int
    """Those left out so that the better response is the longer one as often as the shorter."""
    kept: int

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs judged: {self.failed:,} failed, {self.unclear:,} too close, {self.unbalanced:,} left out to balance "
            f"lengths, {self.kept:,} kept"
        )


def rule_judge(score: Callable[[str, str], float]) -> Judge:
    """A judge that compares the scores `score(prompt, response)`."""
    return lambda prompt, a, b: score(prompt, a) - score(prompt, b)


def preference_pairs(
    candidates: Sequence[Candidates],
    judge: Judge,
    *,
    judgements: int = 4,
    least_delta: float = 1.0,
    seed: int = 0,
    workers: int = 1,
) -> tuple[list[Preference], Funnel]:
    """Pair the responses of each prompt at random, judge each pair `judgements` times, keep those whose mean difference is above
    `least_delta`, and balance lengths. `workers` threads judge at once; the result depends on the seed and the judge alone.

    Raises InputError for a number that makes no sense, or a prompt with fewer than two responses.
    """
    if judgements < 1 or workers < 1 or least_delta < 0:
        raise InputError(
            f"judgements is {judgements}, workers {workers} and least_delta {least_delta}; they must be at least 1, 1 and 0"
        )
    pairs: list[tuple[str, str, str]] = []
    for number, each in enumerate(candidates):
        if len(each.responses) < 2:
            raise InputError(f"prompt {number} has {len(each.responses)} responses; a pair needs two")
        different = list(dict.fromkeys(each.responses))
        random.Random(f"{seed}/{number}").shuffle(different)
        pairs += [(each.prompt, a, b) for a, b in list(pairwise(different))[::2]]

    def judged(place: int) -> float | None:
        try:
            return mean_delta(*pairs[place], judge, judgements=judgements, seed=f"{seed}/{place}")
        except JudgeError:
            return None

    with ThreadPoolExecutor(workers) as pool:
        deltas = list(pool.map(judged, range(len(pairs))))
    clear = [
        Preference(prompt, *((a, b) if delta > 0 else (b, a)), abs(delta))
        for (prompt, a, b), delta in zip(pairs, deltas, strict=True)
        if delta is not None and abs(delta) > least_delta
    ]
    kept = balance_lengths(clear)
    failed = deltas.count(None)
    return kept, Funnel(len(pairs), failed, len(pairs) - failed - len(clear), len(clear) - len(kept), len(kept))


def mean_delta(prompt: str, a: str, b: str, judge: Judge, *, judgements: int, seed: str) -> float:
    """By how much a is better than b, over judgements in random order, each order as often as the other: a judge that prefers what it
    reads first (or second) prefers neither."""
    draw = random.Random(seed)
    swapped = [index % 2 == 1 for index in range(judgements)]
    if judgements % 2:
        swapped[-1] = draw.random() < 0.5
    draw.shuffle(swapped)
    return sum(-judge(prompt, b, a) if swap else judge(prompt, a, b) for swap in swapped) / judgements


def balance_lengths(preferences: Sequence[Preference]) -> list[Preference]:
    """As many pairs whose chosen response is the longer one as pairs whose rejected one is: of the more frequent kind, those that
    differ most in length are left out. Order is kept."""
    differences = [len(each.chosen) - len(each.rejected) for each in preferences]
    longer = [index for index, difference in enumerate(differences) if difference > 0]
    shorter = [index for index, difference in enumerate(differences) if difference < 0]
    more, fewer = (longer, shorter) if len(longer) > len(shorter) else (shorter, longer)
    dropped = set(sorted(more, key=lambda index: (-abs(differences[index]), index))[: len(more) - len(fewer)])
    return [each for index, each in enumerate(preferences) if index not in dropped]


def write_preferences(preferences: Sequence[Preference], path: str | Path) -> None:
    """Rows for `finback reward-model --kind pairwise`."""
    rows = [
        {"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected, "delta": each.delta} for each in preferences
    ]
    write_atomic(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
