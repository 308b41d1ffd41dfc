"""The degraded mode of code rewards, a module of its own so that nobody has it without naming it: limits, and no walls."""

from collections.abc import Mapping
from typing import Any

from finback.rewards.code import all_passed, tested
from finback.rewards.sandbox import require


def unit_tests_unsandboxed(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """`finback.rewards.code:unit_tests` without bubblewrap. What a model writes then runs with the network and this machine's files in
    its reach."""
    return all_passed(tested(prompt, completion, example, "degraded"))


def prepare() -> None:
    """Refuse before the first completion where programs cannot even be run under limits: InputError, with the remedy."""
    require("degraded")
