"""Problems of the `reasoning-gym` package (Apache-2.0, more than a hundred families) in our form."""

from collections.abc import Iterator
from typing import Any

from finback.config import InputError, nearest
from finback.data.problems import Problem, is_held_out


def gym_problems(family: str, count: int, *, seed: int = 0, held_out: bool = False, **difficulty: Any) -> Iterator[Problem]:
    """`count` problems of a reasoning-gym family; `difficulty` goes to the family as it is.

    A worked solution is given only where the family has one (gsm_symbolic); elsewhere `reasoning` is empty. The
    held-out questions are those of `is_held_out`, as for the built-in problems. Needs the extra `rl`. Raises
    InputError if the package is missing, the family or a difficulty field is unknown, or the family has no single
    answer as text.
    """
    for entry in _entries(family, count, seed, held_out, difficulty):
        yield _problem(family, entry)


def gym_rows(family: str, count: int, *, seed: int = 0, held_out: bool = False, **difficulty: Any) -> Iterator[dict[str, Any]]:
    """The same problems as rows for the family's own scorer (`finback.rewards.gym`), families with many right answers included.

    A row has question, prompt, answer (None where the family gives none), language, family, and under "gym" the family's name and the
    entry as reasoning-gym made it.
    """
    for entry in _entries(family, count, seed, held_out, difficulty):
        question = entry["question"].strip()
        yield {
            "question": question,
            "prompt": question,
            "answer": entry["answer"],
            "language": "en",
            "family": f"gym/{family}",
            "gym": {"family": family, "entry": entry},
        }


def _entries(family: str, count: int, seed: int, held_out: bool, difficulty: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`count` entries as reasoning-gym makes them, held-out ones or others."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise InputError("problems of reasoning-gym need that package; install finback[rl]") from None
    if family not in DATASETS:
        raise InputError(f"reasoning-gym has no family {family!r}{nearest(family, sorted(DATASETS))}")
    size = 2 * count + 64  # some families lay out a table of this size at once
    produced, block = 0, 0
    while produced < count:
        try:
            # Entry i is drawn from seed + i, so blocks that are a size apart share nothing.
            dataset = reasoning_gym.create_dataset(family, size=size, seed=seed + block * size, **difficulty)
        except (TypeError, AssertionError) as error:
            raise InputError(f"reasoning-gym family {family} does not take {difficulty}: {error}") from None
        block += 1
        for index in range(size):
            entry = dataset[index]
            if is_held_out(entry["question"].strip()) == held_out and produced < count:
                produced += 1
                yield entry


def _problem(family: str, entry: dict[str, Any]) -> Problem:
    if not isinstance(entry["answer"], str):
        raise InputError(f"reasoning-gym family {family} has no single answer as text; its own scorer is needed")
    solution = entry["metadata"].get("answer_cot") or ""
    return Problem(entry["question"].strip(), solution.split("\n####", 1)[0], entry["answer"], f"gym/{family}")
