"""`finback fetch` at the terminal."""

from pathlib import Path

import pytest

from finback.cli import main
from finback.data.items import ITEMS


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
