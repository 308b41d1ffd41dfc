"""`metrics.jsonl`: each step once, whole lines only, through kills, resumes and full disks."""

import errno
import io
import json
import math
import os
import pty
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from finback.config import InputError
from finback.train.metrics import MetricsWriter, TerminalBar, append_line, describe_row, read_metrics


def row(step: int, **more: float) -> dict[str, float | int]:
    return {"step": step, "tokens": 100 * step, "loss": 5.0 - step / 10, **more}


def test_each_row_is_one_line_with_floats_in_full(tmp_path: Path) -> None:
    loss = 2.718281828459045
    with MetricsWriter(tmp_path, total_steps=2) as writer:
        writer.log({"step": 1, "loss": loss, "lr": 1e-07})
        writer.log({"step": 2, "loss": 0.1 + 0.2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": loss, "lr": 1e-07},
        {"step": 2, "loss": 0.1 + 0.2},
    ]


def test_a_step_cannot_be_recorded_twice(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, total_steps=5) as writer:
        writer.log(row(3))
        with pytest.raises(ValueError, match="step 3 does not follow step 3"):
            writer.log(row(3))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_nan_stays_visible_and_the_file_stays_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, total_steps=3, line_seconds=1e9) as writer:
        writer.log(row(1))
        writer.log({"step": 2, "loss": math.nan, "grad_norm": math.inf, "mfu": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert math.isnan(last["loss"])
    assert last["grad_norm"] == math.inf
    assert last["mfu"] == -math.inf
    assert "loss nan" in capsys.readouterr().out


def test_resume_drops_later_rows_and_half_a_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, total_steps=9) as writer:
        for step in range(1, 8):
            writer.log(row(step))
            writer.log_expert_load(step, [[step, 1], [2, 3]])
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 8, "lo')
    assert [found["step"] for found in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    with MetricsWriter(tmp_path, total_steps=9, resume_step=5) as writer:
        for step in range(6, 10):
            writer.log(row(step))
            writer.log_expert_load(step, [[0, 0], [0, 0]])
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        assert [found["step"] for found in read_metrics(tmp_path / name)] == list(range(1, 10))
    assert read_metrics(tmp_path / "expert_load.jsonl")[4]["counts"] == [[5, 1], [2, 3]]


def test_a_fresh_run_starts_with_empty_files(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, total_steps=9) as writer:
        writer.log(row(1))
    with MetricsWriter(tmp_path, total_steps=9) as writer:
        writer.log(row(1))
    assert [found["step"] for found in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 400), keep=st.integers(0, 6))
def test_any_cut_leaves_each_step_once_after_resume(tmp_path_factory: pytest.TempPathFactory, cut: int, keep: int) -> None:
    """Wherever a kill cut the file, if the rows up to the checkpoint are whole, the resumed file has each step once."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    content = b"".join(json.dumps(row(step)).encode() + b"\n" for step in range(1, 7))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    if keep > whole:
        return
    writer = MetricsWriter.__new__(MetricsWriter)  # the cut alone: no terminal, no events
    writer.directory = path.parent
    writer.truncate_after(keep)
    assert [found["step"] for found in read_metrics(path)] == list(range(1, keep + 1))
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:keep])


def test_a_broken_line_in_the_middle_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"loss": 2.0}\n')
    with pytest.raises(InputError, match="line 2 holds no step"):
        read_metrics(path)


def test_a_full_disk_passes_through_and_leaves_no_half_line(tmp_path: Path) -> None:
    """The file-size limit of the process stands in for the disk: the kernel writes a part, then refuses."""
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open(path, "ab", buffering=0) as file:
        append_line(file, row(1))
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                append_line(file, row(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.stat().st_size == size
    assert len(read_metrics(path)) == 1


def test_kill_9_loses_no_finished_row(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from finback.train.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], total_steps=50)\n"
        "for step in range(1, 31):\n"
        "    writer.log({'step': step, 'loss': 1.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [found["step"] for found in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 31))


def test_plain_lines_are_rare_but_held_out_losses_and_the_last_row_always_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsWriter(tmp_path, total_steps=100, line_seconds=1e9) as writer:
        for step in range(1, 101):
            writer.log(row(step, **({"validation_loss": 4.5} if step == 40 else {})))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/100", "40/100", "100/100"]
    assert "held-out 4.5000" in lines[1]


def test_a_missing_tensorboard_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with MetricsWriter(tmp_path, total_steps=2) as writer:
        writer.log(row(1))
        writer.log(row(2))
    assert capsys.readouterr().out.count("TensorBoard events are not written") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_tensorboard_holds_the_scalars_and_a_resume_purges_the_later_ones(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    program = (  # its own process: event files are read in the order of their names, which count up within one
        "import sys\n"
        "from finback.train.metrics import MetricsWriter\n"
        "for resume_step, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):\n"
        "    with MetricsWriter(sys.argv[1], total_steps=6, resume_step=resume_step) as writer:\n"
        "        for step in steps:\n"
        "            writer.log({'step': step, 'loss': float(step if resume_step is None else -step)})\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], check=True, capture_output=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, -2), (3, -3), (4, -4)]


def test_the_bar_shows_loss_speed_and_step() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, highlight=False, legacy_windows=False)
    bar = TerminalBar(console, total_steps=10, total_seconds=None)
    bar.show(row(4, tokens_per_second=12345.6))
    bar.show(row(5, validation_loss=4.25))
    bar.close()
    shown = screen.getvalue()
    assert "step 4/10" in shown
    assert "12,346 tokens/s" in shown
    assert "held-out 4.2500" in shown


def test_the_bar_of_reinforcement_learning_shows_what_is_learnt() -> None:
    console = Console(file=(out := io.StringIO()), force_terminal=True, width=140, highlight=False, legacy_windows=False)
    bar = TerminalBar(console, total_steps=10, total_seconds=None)
    bar.show(row(4, reward=0.625, completion_length=31.4, logprob_gap=0.0021, tokens_per_second=12345.6))
    bar.close()
    for words in ("reward 0.625", "length 31.4", "gap 0.0021", "12,346 tokens/s"):
        assert words in out.getvalue()
    assert "loss" not in out.getvalue()


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from finback.train.metrics import MetricsWriter\n"
        "with MetricsWriter(sys.argv[1], total_steps=None, total_seconds=60) as writer:\n"
        "    writer.log({'step': 1, 'seconds': 30.0, 'loss': 1.25, 'tokens_per_second': 1000.0})\n"
        "    writer.say('a sentence')\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=slave, stderr=slave, env=environment) as child:
        os.close(slave)
        shown = b""
        try:
            while part := os.read(master, 65536):
                shown += part
        except OSError:
            pass  # how Linux tells that the other side of a pty has closed
        os.close(master)
    assert child.returncode == 0
    assert "━" in shown.decode()
    assert "loss 1.2500" in shown.decode()
    assert "a sentence" in shown.decode()


def test_describe_row_leaves_out_what_was_not_measured() -> None:
    assert describe_row({"step": 3, "loss": 2.0, "max_violation": 0.5}) == "loss 2.0000  max violation 0.50"
