"""Whether a problem of an evaluation was seen in training: by normalised hash of questions, and by its words inside running text."""

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from finback.eval.task import AnyTask, question
from finback.rewards.reward import Example

_PIECE = re.compile(r"([0-9]+(?:\.[0-9]+)?|[一-鿿]|[^\W\d_一-鿿]+|[-+*/=])|([?!.。;:\n])")
_NUMBER_OR_SIGN = re.compile(r"[0-9]|[-+*/=]$")
_ANCHOR = 4  # words at the start of a question that are looked up at each place of a text


def words(text: str) -> list[str]:
    """The numbers, words, Chinese characters and signs of arithmetic of a text, in one case, without punctuation and spacing."""
    return _cut(text)[0]


def question_hash(text: str) -> str:
    """A hash that two questions share where they differ only in case, width, spacing or punctuation."""
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()


def overlap(task: AnyTask, training_hashes: Collection[str]) -> int:
    """How many of a task's questions have the hash of a question that was trained on."""
    return sum(question_hash(question(example)) in training_hashes for example in task.examples)


def occurrences(task: AnyTask, texts: Iterable[str]) -> list[Example]:
    """The task's examples whose question stands, word for word, anywhere in `texts`, in the task's order.

    One pass over the texts; each is cut into words as a question is, so that spacing, case and punctuation hide nothing. Where a
    sum or a list goes on at an end of the question (3 + 5 inside 3 + 5 + 9) it is another question. One of fewer than four words
    is found only where it is a text of its own.
    """
    wanted: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    short: set[tuple[str, ...]] = set()
    for example in task.examples:
        key = tuple(words(question(example)))
        if len(key) < _ANCHOR:
            short.add(key)
        elif key not in (listed := wanted.setdefault(key[:_ANCHOR], [])):
            listed.append(key)
    found: set[tuple[str, ...]] = set()
    for text in texts:
        cut, ends = _cut(text)
        if len(cut) < _ANCHOR:
            found.update(short.intersection([tuple(cut)]))
        for start, anchor in enumerate(zip(*(cut[start:] for start in range(_ANCHOR)), strict=False)):
            for key in wanted.get(anchor, ()):
                if key not in found and tuple(cut[start : start + len(key)]) == key and not _goes_on(cut, ends, start, len(key)):
                    found.add(key)
    return [example for example in task.examples if tuple(words(question(example))) in found]


def row_texts(value: Any) -> Iterator[str]:
    """Every text in a row of data, a JSON value: each is searched for itself, as it reads and not as JSON escapes it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from row_texts(inner)


def _cut(text: str) -> tuple[list[str], set[int]]:
    """The words, and the places of those behind which a sentence or a line ends."""
    cut: list[str] = []
    ends: set[int] = set()
    for word, end in _PIECE.findall(unicodedata.normalize("NFKC", text).casefold()):
        if word:
            cut.append(word)
        elif end:
            ends.add(len(cut) - 1)
    return cut, ends


def _goes_on(cut: Sequence[str], ends: Collection[int], start: int, length: int) -> bool:
    """Whether numbers or signs go on over an end of these words, with no end of a sentence between."""
    borders = ((start - 1, start), (start + length - 1, start + length))
    return any(
        before >= 0
        and after < len(cut)
        and before not in ends
        and bool(_NUMBER_OR_SIGN.match(cut[before]) and _NUMBER_OR_SIGN.match(cut[after]))
        for before, after in borders
    )
