"""Rewards in worker processes that can be killed, so that no completion can stop a training run.

A pool starts one small process, the keeper (`finback.rewards.keeper`), which forks the workers and enforces the deadline; neither
imports torch unless a reward does. The results are those of `finback.rewards.reward.score`, whatever the number of processes, as long
as a reward depends on its arguments alone.
"""

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from finback.config import InputError
from finback.rewards.channel import MAX_MESSAGE_BYTES, Channel, Report, address, encode_sample
from finback.rewards.keeper import LOADING_SECONDS, READY, Setup
from finback.rewards.reward import Example, FailureKind, Outcome, Reward, Score, check_names, compose

END_SECONDS = 10.0
MOST_RESTARTS = 3
LEAST_MEMORY_BYTES = 256 << 20
DEFAULT_MEMORY_BYTES = 4 << 30

_PROGRAM = "import sys; sys.path[:] = {path!r}; from finback.rewards.keeper import main; main({descriptor})"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass
class _Open:
    """A sample that has not all its components yet; they come in order."""

    key: Hashable
    content: bytes
    outcomes: list[Outcome] = field(default_factory=list)


class RewardPool:
    """Scores completions in `processes` workers, as a context manager; use it from one thread at a time.

    `deadline` is in seconds and holds for each call of a reward function: one that takes longer is killed with every process it has
    started, its component counts 0, and the other components and completions are scored as if nothing had happened. So do components
    whose function raises, returns no finite number, or ends its process. `memory_bytes` bounds the address space of each worker; None
    leaves it as it is.

    Leaving the block ends all processes. They also end by themselves when this process does, however it dies (on Linux, with everything
    that a reward may have detached from them).
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        processes: int = 1,
        deadline: float = 10.0,
        memory_bytes: int | None = DEFAULT_MEMORY_BYTES,
    ) -> None:
        """Start the keeper without waiting for it. Raises InputError for a reward without a spec, or fields out of range."""
        check_names(rewards)
        for reward in rewards:
            if not reward.spec:
                raise InputError(f"reward {reward.name!r} has no spec; workers find functions by it, so use load_reward")
        if processes < 1:
            raise InputError(f"processes is {processes}, it must be at least 1")
        if not 0 < deadline < float("inf"):
            raise InputError(f"deadline is {deadline} seconds, it must be above 0 and finite")
        if memory_bytes is not None and memory_bytes < LEAST_MEMORY_BYTES:
            raise InputError(f"memory_bytes is {memory_bytes}, a worker needs at least {LEAST_MEMORY_BYTES}")
        self._rewards = tuple(rewards)
        self._setup = Setup(tuple(reward.spec for reward in rewards), processes, deadline, memory_bytes)
        self._failures: Counter[tuple[str, FailureKind]] = Counter()
        self._numbers = itertools.count()
        self._open: dict[int, _Open] = {}
        self._done: list[tuple[Hashable, Score]] = []
        self._restarts = 0
        self._closed = False
        self._ready = False
        self._start()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """What it computes."""
        return self._rewards

    @property
    def outstanding(self) -> int:
        """How many submitted completions have not been collected."""
        return len(self._open) + len(self._done)

    @property
    def failures(self) -> dict[str, dict[FailureKind, int]]:
        """How often each component has failed so far, by kind; components that never did are left out."""
        counted: dict[str, dict[FailureKind, int]] = {}
        for (name, kind), count in sorted(self._failures.items()):
            counted.setdefault(name, {})[kind] = count
        return counted

    def wait_ready(self) -> None:
        """Wait until the rewards are loaded; `submit` does it, too. InputError says why the workers cannot start."""
        if self._ready:
            return
        told = b""
        while not self._channel.closed and not told:
            told = next(iter(self._channel.receive() or ()), b"")
        if told != READY:
            code = self._end_keeper()
            self.close()
            if code == -signal.SIGALRM:
                raise InputError(f"the rewards are not loaded after {LOADING_SECONDS} s; see what their modules do on import")
            raise InputError(told.decode() if told else f"loading the rewards ended their process (exit code {code})")
        self._ready = True

    def submit(self, key: Hashable, prompt: str, completion: str, example: Example) -> None:
        """Have a completion scored; `collect` gives its score with the key. Returns at once but for the first, see `wait_ready`."""
        if self._closed:
            raise ValueError("the pool is closed")
        content = encode_sample(prompt, completion, example)
        if len(content) > MAX_MESSAGE_BYTES // 2:
            raise InputError(f"a completion with its prompt and row has {len(content)} bytes, more than can be scored")
        self.wait_ready()
        number = next(self._numbers)
        self._open[number] = _Open(key, content)
        self._channel.send(address(number, 0, content))

    def collect(self, *, wait: bool) -> list[tuple[Hashable, Score]]:
        """The scores that have come since the last call, in the order in which they came.

        With `wait`, blocks until there is at least one, unless nothing is outstanding.
        """
        while self._open and (self._readable(0) or (wait and not self._done and self._readable(None))):
            for message in self._channel.receive() or ():
                self._take(Report.decode(message))
            if self._channel.closed:
                self._restart()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End every process; what is outstanding is lost. Closing twice is nothing."""
        self._closed = True
        self._open.clear()
        self._channel.close()
        if not self._ready and self._keeper.returncode is None:
            self._keeper.kill()  # it is loading, and would not see that the channel has ended
        self._end_keeper()

    def _take(self, report: Report) -> None:
        sample = self._open[report.number]
        sample.outcomes.append(report.outcome)
        if report.outcome.failure is not None:
            self._failures[self._rewards[report.component].name, report.outcome.failure] += 1
        if len(sample.outcomes) == len(self._rewards):
            del self._open[report.number]
            self._done.append((sample.key, compose(self._rewards, sample.outcomes)))

    def _readable(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        return bool(poll.poll(None if seconds is None else 1000 * seconds))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        with theirs:
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path, descriptor=descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a reward may print as it likes
                pass_fds=[descriptor],
                start_new_session=True,  # Ctrl-C is the trainer's to handle
                env={"PYTHONHASHSEED": "0", **os.environ, **_ONE_THREAD},
            )
        self._channel = Channel(ours)
        self._channel.send(self._setup.encode())
        self._ready = False

    def _restart(self) -> None:
        """Go on with a new keeper after something has killed the old one."""
        self._restarts += 1
        code = self._end_keeper()
        self._channel.close()
        if self._restarts > MOST_RESTARTS:
            self.close()
            raise RuntimeError(
                f"the process that keeps the reward workers ended {self._restarts} times, last with exit code {code}"
            )
        self._start()
        self.wait_ready()
        for number, sample in self._open.items():
            self._channel.send(address(number, len(sample.outcomes), sample.content))

    def _end_keeper(self) -> int:
        try:
            return self._keeper.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._keeper.pid, signal.SIGKILL)
            return self._keeper.wait()
