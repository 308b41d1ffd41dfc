"""Directories that are either whole or absent: they are filled beside their place and swapped in with one rename."""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finback.config import InputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replaced_directory(target: Path, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """A new directory beside `target` that takes its place when the block ends well, and vanishes otherwise.

    What an existing `target` holds is carried over (as hard links where the file system has them), except what the
    block has written anew and what `is_stale` says of its name. On Linux the two directories are exchanged in one
    call: killed at any moment, `target` is the old one or the new one, whole. Elsewhere there is an instant between two
    renames in which both lie complete beside the name. A killed process can leave a hidden `.NAME.*.tmp` behind.

    Raises InputError if `target` is a file.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, a directory is to be written there; give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            _carry_over(target, temporary, is_stale)
        _sync(temporary)
        _swap_in(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _carry_over(source: Path, destination: Path, is_stale: Callable[[str], bool]) -> None:
    for entry in source.iterdir():
        if is_stale(entry.name) or (destination / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, destination / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, destination / entry.name)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination, follow_symlinks=False)


def _swap_in(temporary: Path, target: Path) -> None:
    """Put `temporary` at `target`. What was there ends at `temporary`, or is removed."""
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        former = temporary.with_suffix(".old")
        os.rename(target, former)
        os.rename(temporary, target)
        shutil.rmtree(former)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; False where system or file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    code: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return code == 0


def _sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
