"""Directories are replaced whole or not at all, whatever stops the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finback.config import InputError
from finback.model.directory import replaced_directory, write_durably


def is_stale(name: str) -> bool:
    return name.startswith("old")


def fill(directory: Path) -> None:
    (directory / "nested" / "deeper").mkdir(parents=True)
    (directory / "old-weights").write_text("old")
    (directory / "config").write_text("old")
    (directory / "notes").write_text("mine")
    (directory / "nested" / "deeper" / "file").write_text("mine too")
    (directory / "link").symlink_to("notes")


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_new_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "some" / "where"
    with replaced_directory(target, is_stale) as temporary:
        write_durably(temporary / "config", b"new")
        assert not target.exists()
    assert names(tmp_path) == ["some", "some/where", "some/where/config"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_existing_directory_keeps_what_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target)
    with replaced_directory(target, is_stale) as temporary:
        write_durably(temporary / "config", b"new")
    assert names(target) == ["config", "link", "nested", "nested/deeper", "nested/deeper/file", "notes"]
    assert (target / "config").read_text() == "new"
    assert (target / "link").is_symlink()
    assert (target / "nested" / "deeper" / "file").read_text() == "mine too"
    assert names(tmp_path)[0] == "model", "nothing hidden is left beside it"


def test_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    fill(target)
    before = names(tmp_path)

    def interrupted() -> None:
        with replaced_directory(target, is_stale) as temporary:
            write_durably(temporary / "config", b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == before
    assert (target / "config").read_text() == "old"


def test_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    with replaced_directory(tmp_path / "alias", is_stale) as temporary:
        write_durably(temporary / "config", b"new")
    assert (tmp_path / "alias").is_symlink()
    assert (tmp_path / "real" / "config").read_text() == "new"


def test_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(InputError, match="model is a file"), replaced_directory(tmp_path / "model", is_stale):
        pass
    assert (tmp_path / "model").read_text() == "a file"


CRASH = """
import ctypes, os, sys
from pathlib import Path
from finback.model import directory
from finback.model.directory import replaced_directory, write_durably

parent, can_exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.unlink", "shutil.rmtree", "ctypes.dlopen")

def attempt(target, step):
    count = 0
    def die(event, arguments):  # the kernel's view: nothing that Python would still do happens
        nonlocal count
        if event in WATCHED:
            count += 1
            if count == step:
                os._exit(9)
    if not can_exchange:
        sys.platform = "elsewhere"
    sys.addaudithook(die)
    with replaced_directory(target, lambda name: name.startswith("old")) as temporary:
        write_durably(temporary / "config", b"new")
        write_durably(temporary / "weights", b"new")
    os._exit(0)

for step in range(1, 200):
    target = parent / str(step) / "model"
    (target / "nested").mkdir(parents=True)
    for name in ("config", "weights", "old-shard", "nested/mine"):
        (target / name).write_text("old")
    child = os.fork()
    if child == 0:
        attempt(target, step)
    if os.waitpid(child, 0)[1] == 0:
        print(step)
        break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange of directories is a system call of Linux")
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_any_step_the_old_or_the_new_one_is_whole(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH, str(tmp_path), way]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    last = int(result.stdout)
    assert last > 10
    seen = set()
    for step in range(1, last + 1):
        in_place = tmp_path / str(step) / "model"
        if in_place.exists():
            state = state_of(in_place)
        else:  # between the two renames both lie beside the name
            assert way == "two renames"
            hidden = {state_of(path) for path in in_place.parent.iterdir()}
            state = "both beside" if hidden == {"old", "new"} else "lost"
        assert state in ("old", "new", "both beside"), f"killed at step {step}"
        seen.add(state)
    assert seen == ({"old", "new"} if way == "exchange" else {"old", "new", "both beside"})


def state_of(directory: Path) -> str:
    content = {name: (directory / name).read_text() for name in names(directory) if (directory / name).is_file()}
    if content == {"config": "old", "weights": "old", "old-shard": "old", "nested/mine": "old"}:
        return "old"
    return "new" if content == {"config": "new", "weights": "new", "nested/mine": "old"} else "broken"
