"""The reward of the GRPO benchmark, in a module of its own: reward workers import it, and it imports no torch."""

import zlib
from collections.abc import Mapping
from typing import Any

from finback.rewards.code import run_code
from finback.rewards.maths import math_equal
from finback.rewards.maths import prepare as prepare_maths

TESTS = "assert solve(2, 3) == 5\nassert solve(-1, 1) == 0\n"
SOLUTION = "def solve(a, b):\n    return a + b\n"


def prepare() -> None:
    prepare_maths()


def maths(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """Mathematical equality, and a digest of the text in [0, 1), so that the samples of a group never all have the same reward."""
    return math_equal(prompt, completion, example) + _digest(completion)


def code(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """What a program in the sandbox costs, whatever the sample says: the same solution is tested each time."""
    return float(run_code(SOLUTION, TESTS).passed) + _digest(completion)


def _digest(text: str) -> float:
    return zlib.crc32(text.encode("utf-8", errors="replace")) / 2**32
