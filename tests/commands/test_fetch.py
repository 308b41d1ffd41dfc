"""`finback fetch` at the terminal."""

import sys
import time
from pathlib import Path

import pytest

from finback.cli import main
from finback.commands import fetch as command
from finback.data.items import ITEMS, Item


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--cache", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr().out
    for item in ITEMS:
        assert item.name in shown
    assert "evals 3.0.1.post1 (PyPI)" in shown
    assert "public domain" in shown
    assert "46.3 MB" in shown
    assert str(tmp_path / "cache") in shown
    assert not (tmp_path / "cache").exists()


def test_get_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "python-stdlib", "--cache", str(tmp_path)]) == 0
    assert "python-stdlib: writing\n" in capsys.readouterr().out
    assert main(["fetch", "python-stdlib", "python-stdlib", "--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"python-stdlib: already in {tmp_path / 'python-stdlib'}\n"
    assert main(["fetch", "--cache", str(tmp_path)]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line]
    assert ["python-stdlib", "yes"] in rows
    assert ["problems", "-"] in rows


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_what_lies_on_the_disk(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that puts half of the package down, beside what an older one left, and waits until that is told."""
    item = next(item for item in ITEMS if item.package is not None and item.package.size > 10_000_000)
    assert item.package is not None
    half = item.package.size // 2
    left = tmp_path / "packages" / ".download-old"
    left.mkdir(parents=True)
    (left / "rest").write_bytes(b"x" * 1000)
    monkeypatch.setattr(command, "SECONDS_BETWEEN_LOOKS", 0.001)
    monkeypatch.setattr(command, "SECONDS_BETWEEN_LINES", 0.001)
    shown = ""

    def download(item: Item, cache: Path) -> Path:
        nonlocal shown
        folder = cache / "packages" / ".download-new" / "inner"
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x" * half)
        while f"{half / 1e6:.1f}" not in shown:
            shown += capsys.readouterr().err
            time.sleep(0.01)
        (cache / item.name).mkdir()
        return cache / item.name

    monkeypatch.setattr(command, "fetch", download)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["fetch", item.name, "--cache", str(tmp_path)]) == 0
    if not terminal:
        assert f"{item.name}: {half / 1e6:.1f} of {item.package.size / 1e6:.1f} MB\n" in shown


def test_mistakes_are_one_sentence_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for words, expected in (
        (["problems", "fabels-en"], "there is nothing called 'fabels-en' to fetch; did you mean 'fables-en'?"),
        (["problems", "--cache", str(tmp_path / "file")], "is a file; give a directory"),
        (["--cash", "x"], "unknown field --cash; the nearest is --cache"),
        (["a/b c"], "could not get the data set a/b c from the Hugging Face hub"),
    ):
        assert main(["fetch", *words, *([] if "--cache" in words else ["--cache", str(tmp_path / "cache")])]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert list((tmp_path / "cache").rglob("*.jsonl")) == []
