"""Run competitors in turns: ours, theirs, ours, theirs, ... and keep every time.

Each competitor lives in a process of its own, which is blocked while another one has its turn. That is fairer than one process:
libraries keep caches of compiled kernels per process (oneDNN's holds 1024), and a peer that fills them with new shapes at every step
would slow down whoever comes next. Machines drift by 15-25% within minutes, which is why turns alternate.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Run = Callable[[Any], Any]
"""One turn: gets an item of the schedule; what it returns travels back, so it must be small and picklable."""
Build = Callable[[], Run]
"""Prepares a competitor, outside the measured time. Must be picklable: a module's function, or a `functools.partial` of one."""


class Turn(NamedTuple):
    """What one competitor did in one turn."""

    seconds: float
    value: Any


class Summary(NamedTuple):
    """The middle of several measurements, and how far they lie apart."""

    median: float
    spread_percent: float | None  # (largest - smallest) / median; None for a single measurement


def alternate(competitors: Mapping[str, Build], schedule: Sequence[Any], *, separate: bool = True) -> dict[str, list[Turn]]:
    """Every item of `schedule` in order, by each competitor in order; all turns of each, warm-up included.

    With `separate` false everything happens in this process, which is enough where nothing lasting is shared.
    """
    if not separate:
        runs = {name: build() for name, build in competitors.items()}
        turns: dict[str, list[Turn]] = {name: [] for name in competitors}
        for item in schedule:
            for name, run in runs.items():
                turns[name].append(_timed(run, item))
        return turns
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_Worker(name, build)) for name, build in competitors.items()}
        for worker in workers.values():
            worker.answer()  # built
        turns = {name: [] for name in competitors}
        for item in schedule:
            for name, worker in workers.items():
                worker.ask(item)
                turns[name].append(worker.answer())
    return turns


def in_a_fresh_process(build: Build, item: Any = None) -> Any:
    """What one turn of one competitor returns."""
    return alternate({"only": build}, [item])["only"][0].value


def summarize(values: Sequence[float]) -> Summary:
    """Median, and the range as a share of it."""
    median = statistics.median(values)
    spread = 100 * (max(values) - min(values)) / median if len(values) > 1 else None
    return Summary(median, spread)


def _timed(run: Run, item: Any) -> Turn:
    start = time.perf_counter()
    value = run(item)
    return Turn(time.perf_counter() - start, value)


class _Worker:
    """A process that builds one competitor and then answers each item with a Turn."""

    def __init__(self, name: str, build: Build) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, theirs), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()  # the worker's next read ends it
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, item: Any) -> None:
        self._connection.send(item)

    def answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join(timeout=10)
            code = self._process.exitcode
            raise RuntimeError(f"competitor {self._name!r} ended with exit code {code}; its own message stands above") from None


def _serve(build: Build, connection: Connection) -> None:
    run = build()
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_timed(run, item))
