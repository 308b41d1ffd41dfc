"""The process in which reward functions run: forked by the keeper, one completion at a time, killed when it takes too long."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence

from finback.rewards.channel import Channel, Report, decode_sample, read_address
from finback.rewards.reward import Outcome, RewardFunction, outcome_of

RETIRED = Report(0, 0xFFFF, Outcome())
"""The last report of a worker that leaves by itself."""

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl
_SET_CHILD_SUBREAPER = 36


def set_parent_death_signal() -> None:
    """Be killed when the thread that started this process ends; Linux only."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends; Linux only."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def run_worker(channel: Channel, functions: Sequence[RewardFunction], keeper: int, memory_bytes: int | None) -> None:
    """Score what comes on `channel`, a blocking one, until it ends; leaves the process and never returns.

    The process leads a session, and so a process group, of its own. `memory_bytes` limits its address space; after a reward ran out of
    memory the worker leaves, for nobody knows what of it is still held.
    """
    code = 1
    try:
        os.setsid()
        set_parent_death_signal()
        if os.getppid() != keeper:  # it ended before the line above
            return
        if memory_bytes is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
        _serve(channel, functions)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(channel: Channel, functions: Sequence[RewardFunction]) -> None:
    process = os.getpid()
    while not channel.closed:
        for message in channel.receive() or ():
            number, first, content = read_address(message)
            sample = decode_sample(content)
            for component in range(first, len(functions)):
                outcome = outcome_of(functions[component], *sample)
                if os.getpid() != process:  # the reward forked, and its child came back here
                    return
                channel.send(Report(number, component, outcome).encode())
                if outcome.failure == "out_of_memory":
                    channel.send(RETIRED.encode())
                    return
