"""Reward functions that behave badly where the completion asks for it, and give 1 to any other."""

import ctypes
import os
import re
import sys
import time
from typing import Any

KEPT: list[bytes] = []


def length(prompt: str, completion: str, example: dict[str, Any]) -> float:
    """A cheap reward that never fails."""
    return len(completion) + example.get("bonus", 0.0)


def hostile(prompt: str, completion: str, example: dict[str, Any]) -> float:
    """Do what the completion says."""
    action = ACTIONS.get(completion)
    return 1.0 if action is None else action()


def lose_a_child_and_hang() -> float:
    """A process in a session of its own whose parent has ended, then a hang."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(600)
    return hang()


def leave_a_child() -> float:
    """A child that sleeps on while the reward returns."""
    if os.fork() == 0:
        time.sleep(600)
    return 1.0


def return_twice() -> float:
    """A child that comes back from the function like its parent, with another score."""
    return 99.0 if os.fork() == 0 else 1.0


def die_with_a_child_left() -> float:
    """The child holds the channel open when its parent has gone."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(4)


def hang() -> float:
    while True:
        pass


def regex() -> float:
    """Exponential, and inside C code that holds the interpreter's lock."""
    return float(bool(re.match(r"(a|a)*b", "a" * 64)))


def memory() -> float:
    """Keep all address space there is, so that nothing is left; zeros that nobody touches, so a slow machine is no slower."""
    while True:
        KEPT.append(bytes(1 << 24))


def print_a_score() -> float:
    print("1.0", flush=True)
    os.write(1, b"1.0\n")
    return 0.25


def exit_by_signal() -> float:
    ctypes.string_at(0)
    return 1.0


def fail() -> float:
    raise ValueError("on purpose")


def interrupt() -> float:
    raise KeyboardInterrupt


ACTIONS = {
    "hang": hang,
    "regex": regex,
    "lose a child and hang": lose_a_child_and_hang,
    "leave a child": leave_a_child,
    "return twice": return_twice,
    "die with a child left": die_with_a_child_left,
    "memory": memory,
    "print": print_a_score,
    "segfault": exit_by_signal,
    "exit": lambda: os._exit(3),
    "exit 0": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(1),
    "raise": fail,
    "interrupt": interrupt,
    "close every file": lambda: float(os.closerange(0, 1000) or 1.0),
    "nan": lambda: float("nan"),
    "str": lambda: "1.0",
    "none": lambda: None,
    "sleep": lambda: time.sleep(600),
}
