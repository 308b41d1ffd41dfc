"""Penalties for length, in characters: a reward sees text, and what a token is depends on the model."""

from finback.config import InputError
from finback.data.reasoning import opens_thought, parse_answer
from finback.rewards.reward import Example

LONGEST = 8000  # characters, about 2,000 tokens of English
BUFFER = 2000
SHORTEST_THOUGHT = 20


def overlong(prompt: str, completion: str, example: Example) -> float:
    """0 up to a length, then falling to -1: `soft_overlong` of the completion's characters.

    The row's "longest" is where -1 is reached (8000 characters without it), "buffer" the length over which it falls (2000).
    """
    return soft_overlong(len(completion), _length(example, "longest", LONGEST), _length(example, "buffer", BUFFER))


def too_short(prompt: str, completion: str, example: Example) -> float:
    """0 for a thought that is long enough, falling to -1 for none: `soft_short` of the thought's characters without white space.

    The row's "shortest" is the length from which it is enough (20 characters without it).
    """
    thought = parse_answer(completion.lstrip(), starts_in_thought=opens_thought(prompt), tools=False).reasoning
    return soft_short(len("".join(thought.split())), _length(example, "shortest", SHORTEST_THOUGHT))


def soft_overlong(length: float, longest: float, buffer: float) -> float:
    """0 up to `longest - buffer`, then linearly down to -1 at `longest`, and -1 beyond; any unit, the same for all three."""
    if not 0 < buffer <= longest:
        raise InputError(f"buffer is {buffer} and longest {longest}; a buffer is above 0 and at most the longest length")
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer))


def soft_short(length: float, shortest: float) -> float:
    """-1 for length 0, linearly up to 0 at `shortest`, and 0 beyond."""
    if shortest <= 0:
        raise InputError(f"shortest is {shortest}, it must be above 0")
    return min(0.0, length / shortest - 1.0)


def _length(example: Example, field: str, default: int) -> float:
    value = example.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f'the row\'s "{field}" is {value!r}, it must be a number of characters')
    return value
