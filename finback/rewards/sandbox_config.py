"""What a program under test may use, and what its tests say of it."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from finback.config import InputError

Isolation = Literal["bubblewrap", "degraded"]
Language = Literal["python", "c", "cpp"]
Verdict = Literal["passed", "failed", "compile error", "timed out", "out of memory", "too much output", "crashed"]

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What the program may use; a Python interpreter alone takes 2 processes, 30 MiB and 0.02 seconds of CPU."""

    wall_seconds: float = 10.0
    """Of one `run_code` from its start to its verdict, compilation and all tests included."""
    cpu_seconds: int = 8
    """Of each process, in whole seconds, as the system counts them."""
    memory_bytes: int = 512 * MIB
    """Address space of each process, and resident memory of all together."""
    processes: int = 32
    """Processes and threads at one time."""
    output_bytes: int = MIB
    """Of standard output and standard error together, for each test."""
    file_bytes: int = 16 * MIB
    """Of one file, and of all files in the private /tmp together; a compiled program must fit, too."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
            if not number or (field.name != "wall_seconds" and not isinstance(value, int)):
                kind = "seconds" if field.name == "wall_seconds" else "a whole number"
                raise InputError(f"limits: {field.name} is {value!r}; it must be {kind} above 0")


@dataclass(frozen=True)
class InputOutput:
    """One test of a whole program: what it reads on standard input, and what it must print."""

    input: str
    output: str


@dataclass(frozen=True)
class CodeResult:
    """What the tests say. Only `passed` and the two counts are beyond the program's reach: `verdict` and `detail` of a program
    that did not pass repeat what it printed and how it ended, which it chose."""

    passed: bool
    num_passed: int
    num_tests: int
    verdict: Verdict
    """Of the first test that did not pass, or "passed"."""
    detail: str
    """That test and its end in words, at most about a thousand characters; empty where all passed."""
    seconds: float
    """Wall time of it all."""
    isolation: Isolation
