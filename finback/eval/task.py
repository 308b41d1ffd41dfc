"""What can be evaluated: a `Task` is answered in words and scored, a `ChoiceTask` is decided by likelihood."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from finback.rewards.reward import Example, Reward

Extract = Callable[[str, str], str | None]


@dataclass(frozen=True)
class Task:
    """Problems whose answers are written by the model.

    An example has "question", the problem alone; "prompt", what the model is asked, where that is more; "answer"; and
    "language" and "family" where they are known.
    """

    name: str
    examples: Sequence[Example]
    score: Reward
    """Its function gives 1.0 where the completion is right, and from 0 to 1 always; its weight is not used."""
    extract: Extract
    """(prompt, completion) -> the answer in it, in a form in which equal answers are equal texts, for the vote of cons@k."""
    few_shot: Sequence[tuple[str, str]] = ()
    """Solved problems, (question, reply), none of them among the examples."""
    rewards: Sequence[Reward] = ()
    """Where given, they judge in the place of `score`, in the pool: a completion whose weighted sum reaches `least` is right."""
    least: float = 1.0
    needs_pool: bool = False
    """Whether `score` is called in processes that can be killed, while the model goes on: it is slow, may hang, or runs code."""


@dataclass(frozen=True)
class ChoiceTask:
    """Questions with a few answers to choose from. An example has "question", "choices" and "answer", the place of the right
    one."""

    name: str
    examples: Sequence[Example]
    few_shot: Sequence[tuple[str, str]] = ()


AnyTask = Task | ChoiceTask


def asked(example: Example) -> str:
    """What the model is asked: the prompt, or the question where there is no other."""
    return str(example.get("prompt") or example["question"])


def question(example: Example) -> str:
    """The problem alone, without instructions."""
    return str(example.get("question") or example["prompt"])


def distinct(examples: Iterable[Example], most: int | None = None) -> list[Example]:
    """The first `most` examples whose questions differ: a problem that comes twice would count twice."""
    found: dict[str, Example] = {}
    for example in examples:
        found.setdefault(question(example), example)
        if len(found) == most:
            break
    return list(found.values())


def sample_seed(seed: int, example: Example, number: int) -> int:
    """The seed of sample `number` of a problem: the same whatever other problems and samples are drawn, and in whatever order."""
    key = f"{seed}/{number}/{question(example)}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
