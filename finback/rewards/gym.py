"""reasoning-gym's own scorers (extra `rl`), for families whose problems have more than one right answer."""

from collections.abc import Callable
from functools import cache
from typing import Any

from finback.config import InputError, nearest
from finback.rewards.answers import final_answer
from finback.rewards.reward import Example


def gym_score(prompt: str, completion: str, example: Example) -> float:
    """What the problem's family gives the final answer, mostly from 0 to 1; 0 without an answer. Needs the extra `rl`.

    The row carries "gym": {"family": ..., "entry": ...}, the entry as reasoning-gym made it; or "metadata" instead of an entry, with
    the right answer in the row's "answer". Mind that some families give part of the score for an answer that merely holds the right
    one.
    """
    family, entry = _entry(prompt, example)
    answer = final_answer(prompt, completion)
    return 0.0 if answer is None else float(_scorer(family)(answer, entry))


def prepare() -> None:
    """Import reasoning-gym before the first deadline; InputError if it is missing."""
    _scorer("chain_sum")


def _entry(prompt: str, example: Example) -> tuple[str, dict[str, Any]]:
    gym = example.get("gym")
    if not isinstance(gym, dict) or not isinstance(gym.get("family"), str):
        raise InputError('the row has no "gym": {"family": ..., "entry": ...}')
    if isinstance(gym.get("entry"), dict):
        return gym["family"], gym["entry"]
    if isinstance(gym.get("metadata"), dict):
        return gym["family"], {"question": prompt, "answer": example.get("answer"), "metadata": gym["metadata"]}
    raise InputError('the row\'s "gym" has neither an "entry" nor "metadata"')


@cache
def _scorer(family: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise InputError("scorers of reasoning-gym need that package; install finback[rl]") from None
    if family not in DATASETS:
        raise InputError(f"reasoning-gym has no family {family!r}{nearest(family, sorted(DATASETS))}")
    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(family)
    return scorer
