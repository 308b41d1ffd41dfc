"""How far an evaluation is, on stderr: a bar on a terminal, a line now and then elsewhere. Standard output is the result's."""

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressLine(AbstractContextManager["ProgressLine"]):
    """Counts finished pieces of work against `total`, and says how long the rest will take."""

    def __init__(self, title: str, total: int, *, shown: bool = True, line_seconds: float = 10.0) -> None:
        self._title, self._total, self._line_seconds = title, total, line_seconds
        self._shown, self._start, self._printed = shown, time.monotonic(), time.monotonic()
        console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[words]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(title, total=total, words="")
            self._bar.start()

    def show(self, done: int, words: str) -> None:
        """`done` pieces are finished; `words` say what is known so far."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, words=f"{done:,}/{self._total:,}  {words}")
        now = time.monotonic()
        if self._bar is None and self._shown and done and now - self._printed >= self._line_seconds:
            self._printed = now
            minutes, seconds = divmod(round((now - self._start) / done * (self._total - done)), 60)
            line = f"{self._title}  {done:,}/{self._total:,}  {words}  {minutes}:{seconds:02d} left"
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
