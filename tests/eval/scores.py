"""Scores for the noise that a random model writes; no torch, so that a pool has them soon."""

from collections.abc import Mapping
from typing import Any


def letter(prompt: str, completion: str) -> str | None:
    """What stands for an answer: nothing, or one of a few letters."""
    place = sum(completion.encode()) % 4
    return None if place == 3 else "abc"[place]


def is_a(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    return float(letter(prompt, completion) == "a")


def raises_on_sorting(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    if "Sort" in prompt:
        raise ValueError("no sorting today")
    return is_a(prompt, completion, example)


def always_raises(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    raise KeyError("missing")


def length(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    return float(len(completion) > 10)


def out_of_range(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """2 where the model was asked to sort, -0.5 where it was asked why, else whether it is an a."""
    return 2.0 if "Sort" in prompt else -0.5 if "Why" in prompt else is_a(prompt, completion, example)
