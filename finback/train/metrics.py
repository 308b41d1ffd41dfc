"""What a run records: `metrics.jsonl`, `expert_load.jsonl`, TensorBoard events, and what the terminal shows meanwhile.

The files are the truth and stand alone: one JSON object per line, written with one call and never rewritten. A killed
process leaves at most half a last line; whoever resumes cuts the files back to the step of the checkpoint, so that each
step stands exactly once. The terminal is a second reader of the same rows.
"""

import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from finback.config import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EXPERT_LOAD_FILE = "expert_load.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

# JSON has no literals for these; a row must stay readable by every JSON reader, and a NaN loss must stay visible.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """The records of one run in `directory`. One process of a run has it: rank 0.

    Args:
        total_steps: where the run ends, for the ETA; None where a time budget ends it.
        total_seconds: that time budget; the row's `seconds` (training seconds so far) tells how much of it is gone.
        resume_step: the step of the checkpoint that the run continues from; rows after it are dropped. None is a fresh
            run: all are dropped.
        line_seconds: on anything but a terminal, the least time between two printed lines.

    Raises:
        OSError: the directory cannot be written (also from `log`, when the disk is full).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        total_steps: int | None,
        total_seconds: float | None = None,
        resume_step: int | None = None,
        line_seconds: float = 10.0,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._last_step = -1
        self.truncate_after(-1 if resume_step is None else resume_step)
        self._metrics = io.FileIO(self.directory / METRICS_FILE, "a")
        self._expert_load = io.FileIO(self.directory / EXPERT_LOAD_FILE, "a")
        self._view: TerminalBar | PlainLines
        console = Console(highlight=False)
        if console.is_terminal:
            self._view = TerminalBar(console, total_steps=total_steps, total_seconds=total_seconds)
        else:
            self._view = PlainLines(total_steps=total_steps, total_seconds=total_seconds, line_seconds=line_seconds)
        self._events = _open_events(self.directory, resume_step)
        if self._events is None:
            self.say("TensorBoard events are not written: tensorboard is not installed (the extra `report` brings it)")

    def log(self, row: Mapping[str, float | int]) -> None:
        """Record one step: `row["step"]` and whatever was measured in it, as plain Python numbers.

        Raises:
            ValueError: the step was already recorded.
        """
        step = row["step"]
        if step <= self._last_step:
            raise ValueError(f"step {step} does not follow step {self._last_step}: each step is recorded once")
        append_line(self._metrics, {key: _json_number(value) for key, value in row.items()})
        self._last_step = int(step)
        if self._events is not None:
            for key, value in row.items():
                if key != "step":
                    self._events.add_scalar(key, value, int(step))
        self._view.show(row)

    def log_expert_load(self, step: int, counts: Sequence[Sequence[int]]) -> None:
        """Record how many tokens each router sent to each expert in one step.

        Args:
            counts: [num routers, E], rows in the order of `Transformer.routers()`: main layers, then MTP layers.
        """
        append_line(self._expert_load, {"step": step, "counts": [list(row) for row in counts]})

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Keep samples of a step in samples.jsonl, a line each."""
        with io.FileIO(self.directory / SAMPLES_FILE, "a") as file:
            for sample in samples:
                append_line(file, {"step": step, **sample})

    def say(self, sentence: str) -> None:
        """Print a line without disturbing the bar."""
        self._view.say(sentence)

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after `step`, half a last line included. A file that does not exist is left so."""
        for name in (METRICS_FILE, EXPERT_LOAD_FILE, SAMPLES_FILE):
            _cut_after(self.directory / name, step)
        self._last_step = step

    def close(self) -> None:
        """Show the last row, give the terminal back, close the files."""
        self._view.close()
        self._metrics.close()
        self._expert_load.close()
        if self._events is not None:
            self._events.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines record, in order; "NaN" and "Infinity" are floats again. Half a last line is left out.

    Raises:
        InputError: another line is not a JSON object with an integer `step`.
        OSError: the file cannot be read.
    """
    return [row for _, row in _read_lines(Path(path))]


def append_line(file: io.FileIO, record: Mapping[str, Any]) -> None:
    """Add one JSON line. On a full disk the part that was written is taken back, and the OSError names the file."""
    start = file.seek(0, os.SEEK_END)
    rest = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        file.truncate(start)
        error.filename = file.name
        raise


def _cut_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    end = 0
    for after, row in _read_lines(path):
        if row["step"] > step:
            break
        end = after
    os.truncate(path, end)


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(offset of the byte after the line, its row) for each whole line."""
    rows, end = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # only the last line can lack it: the process was killed while it wrote
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}); remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path}, line {number} holds no step; remove the line")
        rows.append((end, {key: _python_number(value) for key, value in row.items()}))
    return rows


def _python_number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _json_number(value: float | int) -> float | int | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _open_events(directory: Path, resume_step: int | None) -> "SummaryWriter | None":
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(directory / TENSORBOARD_DIRECTORY), purge_step=purge_step, flush_secs=30)


def describe_row(row: Mapping[str, float | int]) -> str:
    """A row in words, for the terminal: the loss, then what else it holds of the things people watch."""
    words = []
    for key, form in (
        ("reward", "reward {:.3f}"),
        ("completion_length", "length {:.1f}"),
        ("entropy", "entropy {:.3f}"),
        ("logprob_gap", "gap {:.4f}"),
        ("loss", "loss {:.4f}"),
        ("mtp_loss", "mtp {:.4f}"),
        ("validation_loss", "held-out {:.4f}"),
        ("mtp_acceptance", "drafts accepted {:.1%}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("max_violation", "max violation {:.2f}"),
    ):
        if key in row:
            words.append(form.format(row[key]))
    return "  ".join(words)


def _progress(row: Mapping[str, float | int], total_steps: int | None) -> float:
    """How far the run is, in the unit of its limit: steps, or seconds."""
    return float(row["step"] if total_steps else row.get("seconds", 0.0))


_WATCHED = ("loss", "tokens_per_second")
_WATCHED_RL = ("reward", "completion_length", "logprob_gap", "tokens_per_second")  # its loss is about 0, whatever is learnt


class TerminalBar:
    """A progress bar with loss (or reward, length, gap), tokens per second and the time left; held-out losses and sentences scroll by
    above."""

    def __init__(self, console: Console, *, total_steps: int | None, total_seconds: float | None) -> None:
        self._total_steps, self._total_seconds = total_steps, total_seconds
        columns = (
            TextColumn("{task.fields[step]}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, refresh_per_second=2, expand=True)
        self._task: TaskID | None = None  # made by the first row: a resumed run's speed is not measured from zero
        self._progress.start()

    def show(self, row: Mapping[str, float | int]) -> None:
        total, completed = self._total_steps or self._total_seconds, _progress(row, self._total_steps)
        step = f"step {row['step']:,}" + (f"/{self._total_steps:,}" if self._total_steps else "")
        watched = {key: value for key, value in row.items() if key in (_WATCHED_RL if "reward" in row else _WATCHED)}
        words = describe_row(watched)
        if self._task is None:
            self._task = self._progress.add_task("", total=total, completed=completed, step=step, words=words)  # type: ignore[arg-type]
        self._progress.update(self._task, completed=completed, step=step, words=words)
        if "validation_loss" in row or not math.isfinite(row.get("loss", 0.0)):
            self.say(f"step {row['step']:>7,}  {describe_row(row)}")

    def say(self, sentence: str) -> None:
        self._progress.console.print(Text(sentence))

    def close(self) -> None:
        self._progress.stop()


class PlainLines:
    """The same for a pipe or a file: a line every few seconds, and one for each held-out loss and for the last row."""

    def __init__(self, *, total_steps: int | None, total_seconds: float | None, line_seconds: float) -> None:
        self._total_steps, self._total_seconds, self._line_seconds = total_steps, total_seconds, line_seconds
        self._unprinted: Mapping[str, float | int] | None = None
        self._printed_at = -math.inf
        self._first: tuple[float, float] | None = None  # (time, progress) at the first row; a resumed run's is not zero

    def show(self, row: Mapping[str, float | int]) -> None:
        self._unprinted = row
        due = time.monotonic() - self._printed_at >= self._line_seconds
        if due or "validation_loss" in row or not math.isfinite(row.get("loss", 0.0)):
            self._print(row)

    def _print(self, row: Mapping[str, float | int]) -> None:
        self._unprinted, self._printed_at = None, time.monotonic()
        step = f"step {row['step']:>7,}" + (f"/{self._total_steps:,}" if self._total_steps else "")
        self.say("  ".join(words for words in (step, describe_row(row), self._time_left(row)) if words))

    def _time_left(self, row: Mapping[str, float | int]) -> str:
        total, done = self._total_steps or self._total_seconds, _progress(row, self._total_steps)
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        start, at_start = self._first
        if total is None or done <= at_start or done >= total:
            return ""
        seconds = (total - done) * (now - start) / (done - at_start)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d} left"

    def say(self, sentence: str) -> None:
        print(sentence, flush=True)

    def close(self) -> None:
        if self._unprinted is not None:
            self._print(self._unprinted)
