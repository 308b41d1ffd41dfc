"""Whole or absent."""

from pathlib import Path

import pytest

from finback.config import InputError
from finback.data.files import atomic_directory, read_json, write_atomic


def test_write_atomic(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    write_atomic(file, "字")
    write_atomic(file, b"bytes")
    assert file.read_bytes() == b"bytes"
    assert [entry.name for entry in file.parent.iterdir()] == ["a.txt"]
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "\ud800")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", "x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "taken"]
    assert file.read_bytes() == b"bytes"


def test_atomic_directory(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_directory(target) as directory:
        (directory / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(target)
    assert [entry.name for entry in target.iterdir()] == ["one"]
    with atomic_directory(target) as directory:
        (directory / "three").write_text("3")
    assert [entry.name for entry in target.iterdir()] == ["three"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_read_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(InputError, match=r"a\.json does not exist"):
        read_json(file)
    for content, match in ((b"{", "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"[1]", "holds a JSON list")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=match):
            read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}


def _interrupted(target: Path) -> None:
    with atomic_directory(target) as directory:
        (directory / "two").write_text("2")
        raise KeyboardInterrupt
