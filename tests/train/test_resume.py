"""Runs in processes of their own that are killed, interrupted, starved of disk or find damage, and continue bit for bit."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finback.train.checkpoint import find_damage, list_checkpoints
from finback.train.config import PretrainConfig
from finback.train.pretrain import pretrain
from finback.train.session import read_run_config, resolve_config
from tests.train.runs import finback, micro_config, read_rows

PATIENCE_SECONDS = 300  # for a machine that is busy with other things


def make_config(data: Path, **changes: Any) -> PretrainConfig:
    return micro_config(data, **{"steps": 24, "save_every": 3, "eval_every": 7, "keep_checkpoints": 0} | changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, micro_data: Path) -> Path:
    """The run that nothing interrupts."""
    run = tmp_path_factory.mktemp("reference") / "run"
    pretrain(make_config(micro_data), run)
    return run


def prepare(run: Path, config: PretrainConfig) -> Path:
    """A run that has not begun: as one that was killed before its first checkpoint."""
    run.mkdir()
    (run / "config.json").write_text(json.dumps(resolve_config(config, run, resume=False).to_dict()))
    return run


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.0005)


def count_rows(run: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def begun(run: Path, reference: Path, step: int) -> Path:
    """The reference as it was after `step`, with rows that were logged since."""
    shutil.copytree(reference, run)
    for checkpoint in list_checkpoints(run):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return run


def finish(run: Path) -> None:
    """Resume to the end, in this process."""
    pretrain(read_run_config(run), run, resume=True)


def assert_same_run(run: Path, reference: Path) -> None:
    """Rows, expert loads and every byte of the final state."""
    assert read_rows(run) == read_rows(reference)
    assert (run / "expert_load.jsonl").read_bytes() == (reference / "expert_load.jsonl").read_bytes()
    ours, theirs = list_checkpoints(run)[0], list_checkpoints(reference)[0]
    assert ours.name == theirs.name
    for name in ("model.safetensors", "trainer.safetensors", "ema/model.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*")) if (run / "checkpoints").is_dir() else False


def kill_and_resume(run: Path, kills: list[str], seed: int) -> None:
    """Kill one process after the other: at a random moment of training, or in the middle of a save."""
    generator = random.Random(seed)
    for kind in kills:
        known = count_rows(run)
        with finback("pretrain", "--resume", run) as process:
            wait_for(lambda known=known: count_rows(run) > known + 1, process)  # type: ignore[misc]
            if kind == "saving":
                stop_while_saving(run, process, generator)
            else:
                time.sleep(generator.uniform(0, 0.3))
            process.kill()
        for checkpoint in list_checkpoints(run):
            assert find_damage(checkpoint) is None


def stop_while_saving(run: Path, process: "subprocess.Popen[str]", generator: random.Random) -> None:
    """Halt the process at some moment at which a checkpoint is half written."""
    while True:
        wait_for(lambda: half_written(run), process)
        time.sleep(generator.uniform(0, 0.01))
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None, f"the run ended before a save was met: {process.communicate()}"
        if half_written(run):
            return
        process.send_signal(signal.SIGCONT)


def test_killed_at_any_moment_it_continues_bitwise(
    tmp_path: Path, micro_data: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare(tmp_path / "run", make_config(micro_data))
    kill_and_resume(run, ["saving", "training", "saving"], seed=0)
    finish(run)
    assert f"continuing {run} after step" in capsys.readouterr().out
    assert not half_written(run)
    assert_same_run(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_many_times_it_continues_bitwise(tmp_path: Path, micro_data: Path, seed: int) -> None:
    config = make_config(
        micro_data, steps=120, seed=seed, moments_dtype="bf16", precision="bf16", initial_batch_size=2, batch_ramp_tokens=5000
    )
    pretrain(config, tmp_path / "reference")
    run = prepare(tmp_path / "run", config)
    kill_and_resume(run, ["training", "saving"] * 4, seed=seed)
    finish(run)
    assert_same_run(run, tmp_path / "reference")


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(tmp_path: Path, micro_data: Path, reference: Path) -> None:
    run = prepare(tmp_path / "run", make_config(micro_data))
    with finback("pretrain", "--resume", run) as process:
        wait_for(lambda: count_rows(run) >= 4, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert err.strip() == "finback pretrain: interrupted"
    step = count_rows(run)
    assert f"stopped after step {step}; continue with: finback pretrain --resume {run}" in out
    assert list_checkpoints(run)[0].name == f"step-{step}"
    finish(run)
    assert_same_run(run, reference)


def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_run(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun(tmp_path / "run", reference, step=18)
    damaged = run / "checkpoints" / "step-18"
    (damaged / "trainer.safetensors").write_bytes(b"nothing")
    finish(run)
    out = capsys.readouterr().out
    assert f"checkpoint {damaged} is damaged (trainer.safetensors has 7 bytes" in out
    assert f"continuing {run} after step 15" in out
    assert_same_run(run, reference)


def assert_told_and_unharmed(process: "subprocess.Popen[str]", run: Path, words: str) -> None:
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert words in err
    assert not half_written(run)
    checkpoints = list_checkpoints(run)
    assert checkpoints
    assert all(find_damage(checkpoint) is None for checkpoint in checkpoints)


def test_a_limit_on_file_size_is_told_and_the_last_checkpoint_survives(tmp_path: Path, reference: Path) -> None:
    run = begun(tmp_path / "run", reference, step=18)
    size = (run / "checkpoints" / "step-18" / "model.safetensors").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    process = finback("pretrain", "--resume", run, preexec_fn=limit)
    assert_told_and_unharmed(process, run, os.strerror(errno.EFBIG))
    assert list_checkpoints(run)[0].name == "step-18"
    finish(run)
    assert_same_run(run, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_the_last_checkpoint_survives(small_disk: Path, micro_data: Path, reference: Path) -> None:
    run = prepare(small_disk / "run", make_config(micro_data))
    process = finback("pretrain", "--resume", run)
    assert_told_and_unharmed(process, run, "free")
    rows = read_rows(run)
    assert 3 <= len(rows) < 24
    assert rows == read_rows(reference)[: len(rows)]
