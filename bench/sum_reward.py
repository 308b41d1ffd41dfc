"""The reward of `bench.smollm2`, in a module of its own: reward workers import it, and it imports no torch."""

import re
from collections.abc import Mapping
from typing import Any


def last_number(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """1.0 where the last number of the text is the answer: as little as can be asked of a form that was not taught."""
    numbers = re.findall(r"\d+", completion.replace(",", ""))
    return float(bool(numbers) and numbers[-1] == example["answer"])
