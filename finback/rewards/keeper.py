"""The process between a `RewardPool` and its workers: loads the rewards once, forks workers, holds them to the deadline.

It stands between for three reasons. The trainer must not fork (torch has threads), while this process is small, has one thread and
can, so a killed worker is replaced in milliseconds. Deadlines hold while the trainer computes. And whatever a worker leaves behind
becomes this process's child and is killed: when a worker is replaced, when the pool closes, and when the trainer dies, which shows as
the end of its channel.

Each worker has its samples in a queue and takes them in order, reporting every component as it ends; so the first component of the
first sample that has no report is what the worker is at, and what a hang or a death is charged to. Whatever else stood in the queue is
given to another worker. A queue holds as many samples as take a fiftieth of a second, by the worker's own record: cheap rewards
travel in batches, and a slow one never waits behind another while a worker is idle.

Run as `python -c "...; main(descriptor)"` with a socket to the pool.
"""

import json
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from finback.config import InputError
from finback.rewards.channel import Channel, Report, address, read_address
from finback.rewards.reward import FailureKind, Outcome, RewardFunction, load_module, load_reward
from finback.rewards.worker import RETIRED, adopt_orphans, run_worker

READY = b"ready"
LOADING_SECONDS = 300  # for importing what the rewards need
QUEUE_SECONDS = 0.02
LONGEST_QUEUE = 64
TICK_SECONDS = 1.0  # how often to look whether the pool's process and the workers are still there, besides what sockets tell


@dataclass(frozen=True)
class Setup:
    """The first message of a pool; `deadline` in seconds holds for each call of a reward function."""

    specs: tuple[str, ...]
    processes: int
    deadline: float
    memory_bytes: int | None

    def encode(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @staticmethod
    def decode(message: bytes) -> "Setup":
        fields = json.loads(message)
        return Setup(tuple(fields["specs"]), fields["processes"], fields["deadline"], fields["memory_bytes"])


@dataclass
class _Sample:
    content: bytes
    component: int
    """The first one without a report."""


@dataclass(eq=False)
class _Worker:
    process: int
    channel: Channel
    queue: deque[int] = field(default_factory=deque)
    """Samples that it has, oldest first; it is at the first one."""
    since: float = 0.0
    """When the call in progress began."""
    seconds: float = 1.0
    """A running mean of what a call takes."""
    retired: bool = False


def main(descriptor: int) -> None:
    """Serve the pool at the other end of the socket `descriptor` until it closes."""
    parent = os.getppid()
    channel = Channel(socket.socket(fileno=descriptor))
    messages: list[bytes] = []
    while not messages and not channel.closed:
        messages = channel.receive() or []
    if not messages:
        return
    setup = Setup.decode(messages[0])
    signal.alarm(LOADING_SECONDS)  # a module that hangs on import must not outlive a pool that was killed
    try:
        functions = [_prepared(spec) for spec in setup.specs]
    except InputError as error:
        channel.send(str(error).encode())
        return
    signal.alarm(0)
    channel.send(READY)
    adopt_orphans()
    channel.connection.setblocking(False)
    keeper = Keeper(channel, setup, functions, parent)
    try:
        keeper.accept(messages[1:])
        keeper.run()
    finally:
        keeper.end()


def _prepared(spec: str) -> RewardFunction:
    reward = load_reward(spec)
    module = load_module(spec.partition(":")[0], spec)
    prepare = getattr(module, "prepare", None)
    if prepare is not None:
        try:
            prepare()
        except InputError:
            raise
        except Exception as error:  # somebody else's code
            raise InputError(f"reward {spec!r}: prepare() raised {type(error).__name__}: {error}") from None
    return reward.function


class Keeper:
    """The workers of a pool and the samples that have not all their reports yet."""

    def __init__(self, pool: Channel, setup: Setup, functions: Sequence[RewardFunction], parent: int) -> None:
        self._pool = pool
        self._setup = setup
        self._functions = functions
        self._parent = parent
        self._samples: dict[int, _Sample] = {}
        self._waiting: deque[int] = deque()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(pool, selectors.EVENT_READ)

    def accept(self, messages: Sequence[bytes]) -> None:
        """Take in samples from the pool."""
        for message in messages:
            number, component, content = read_address(message)
            self._samples[number] = _Sample(content, component)
            self._waiting.append(number)

    def run(self) -> None:
        """Work until the pool is gone."""
        looked = time.monotonic()
        while not self._pool.closed and os.getppid() == self._parent:
            self._dispatch()
            for channel in (self._pool, *(worker.channel for worker in self._workers)):
                write = selectors.EVENT_WRITE if channel.unsent else 0
                self._selector.modify(channel, selectors.EVENT_READ | write)
            ready = {key.fileobj for key, _ in self._selector.select(self._patience())}
            if self._pool in ready:
                self._pool.flush()
                self.accept(self._pool.receive() or ())
            for worker in list(self._workers):
                if worker.channel in ready:
                    worker.channel.flush()
                    self._read(worker)
            now = time.monotonic()
            for worker in list(self._workers):
                if worker.queue and now - worker.since >= self._setup.deadline:
                    self._stop_late(worker)
            if now - looked >= TICK_SECONDS:
                looked = now
                for worker in list(self._workers):
                    self._look_after(worker)

    def end(self) -> None:
        """Kill every worker and what it left behind."""
        for worker in self._workers:
            _kill(worker.process)
        _kill_orphans(set())

    def _patience(self) -> float:
        now = time.monotonic()
        left = (worker.since + self._setup.deadline - now for worker in self._workers if worker.queue)
        return max(0.0, min((TICK_SECONDS, *left)))

    def _dispatch(self) -> None:
        while self._waiting:
            worker = min(self._workers, key=lambda worker: len(worker.queue), default=None)
            if (worker is None or worker.queue) and len(self._workers) < self._setup.processes:
                worker = self._start_worker()
            assert worker is not None  # there is at least one process
            room = min(LONGEST_QUEUE, max(1, int(QUEUE_SECONDS / worker.seconds)))
            if len(worker.queue) >= room or worker.channel.unsent:
                return
            number = self._waiting.popleft()
            sample = self._samples[number]
            if not worker.queue:
                worker.since = time.monotonic()
            worker.queue.append(number)
            worker.channel.send(address(number, sample.component, sample.content))

    def _start_worker(self) -> _Worker:
        ours, theirs = socket.socketpair()
        keeper = os.getpid()
        process = os.fork()
        if process == 0:
            for channel in (self._pool, *(worker.channel for worker in self._workers)):
                channel.close()
            self._selector.close()
            ours.close()
            run_worker(Channel(theirs), self._functions, keeper, self._setup.memory_bytes)
        theirs.close()
        ours.setblocking(False)
        worker = _Worker(process, Channel(ours))
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ)
        return worker

    def _read(self, worker: _Worker) -> bool:
        """Pass on what a worker has reported; whether there was something. A worker that is gone is replaced."""
        messages = worker.channel.receive()
        for message in messages or ():
            report = Report.decode(message)
            if report == RETIRED:
                worker.retired = True
            else:
                self._pass_on(worker, report)
        if worker.channel.closed and worker in self._workers:
            self._replace(worker)
        return messages is not None

    def _pass_on(self, worker: _Worker, report: Report) -> None:
        sample = self._samples[report.number]
        self._pool.send(report.encode())
        sample.component = report.component + 1
        now = time.monotonic()
        worker.seconds += 0.2 * (now - worker.since - worker.seconds)
        worker.since = now
        if sample.component == len(self._functions):
            del self._samples[report.number]
            worker.queue.popleft()

    def _stop_late(self, worker: _Worker) -> None:
        number = worker.queue[0]
        call = (number, self._samples[number].component)
        self._replace(worker, late=call)

    def _look_after(self, worker: _Worker) -> None:
        """Replace a worker that has ended while a child of it holds its end of the channel."""
        if os.waitid(os.P_PID, worker.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self._replace(worker)

    def _replace(self, worker: _Worker, late: tuple[int, int] | None = None) -> None:
        """Kill a worker with all it has started, charge the call it was at, and let others have the rest of its queue.

        `late` is the call that passed its deadline; if its report was on the way, nothing is charged.
        """
        self._workers.remove(worker)
        status = _kill(worker.process)
        _kill_orphans({other.process for other in self._workers})
        while self._read(worker):
            pass
        self._selector.unregister(worker.channel)
        worker.channel.close()
        if worker.queue and not worker.retired:
            number = worker.queue[0]
            component = self._samples[number].component
            if late is None:
                self._charge(worker, number, component, "worker_died", _how_it_ended(status))
            elif late == (number, component):
                self._charge(worker, number, component, "timed_out", f"timed out after {self._setup.deadline:g} s")
        self._waiting.extendleft(reversed(worker.queue))

    def _charge(self, worker: _Worker, number: int, component: int, kind: FailureKind, sentence: str) -> None:
        self._pass_on(worker, Report(number, component, Outcome(failure=kind, sentence=sentence)))


def _kill(process: int) -> int:
    """End a worker and its process group; its exit status as `os.waitstatus_to_exitcode` gives it."""
    for kill in (os.kill, os.killpg):  # the group exists once the worker has made it
        with suppress(ProcessLookupError, PermissionError):
            kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # what it had forked in between
    return os.waitstatus_to_exitcode(status)


def _kill_orphans(workers: set[int]) -> None:
    """Kill the children of this process that are not its workers: what workers left behind, generation by generation."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    while listing.is_file():
        orphans = {int(word) for word in listing.read_text().split()} - workers
        if not orphans:
            return
        for orphan in orphans:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(orphan, signal.SIGKILL)
        for orphan in orphans:
            with suppress(ChildProcessError):
                os.waitpid(orphan, 0)


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "ended its process by signal 9 (Killed), as the system does when memory runs out"
    if code < 0:
        return f"ended its process by signal {-code} ({signal.strsignal(-code)})"
    return f"ended its process with exit code {code}"
