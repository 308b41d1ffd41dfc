"""Compiling the kernels: what happens where that is impossible, goes wrong, or goes on twice at once."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finback.ops.native import build
from finback.ops.native.calls import Kernels
from tests.ops.native.rule import compiled

ROOT = Path(__file__).parents[3]
UNOPTIMISED = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)


@pytest.fixture(autouse=True)
def no_kernels_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache directory, a process that has not asked for kernels, and no optimisation, because it takes seconds."""
    compiled()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", UNOPTIMISED)
    build.kernels.cache_clear()
    yield
    build.kernels.cache_clear()


def works(kernels: Kernels | None) -> bool:
    """Whether they compute."""
    if kernels is None:
        return False
    output = torch.zeros(1, 3)
    kernels.linear(torch.tensor([[1.0, 2.0]]), [torch.ones(3, 2)], [output])()
    return output.tolist() == [[3, 3, 3]]


def libraries() -> list[Path]:
    return sorted(build.cache_directory().glob("*"))


def warning_of(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning there was."""
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    return warnings[0]


def pretend_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """A `gcc` that is all there is on the path."""
    directory.mkdir()
    (directory / "gcc").write_text(script, encoding="utf-8")
    (directory / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_a_library_is_compiled_once_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(build.kernels())
    (library,) = libraries()
    written = library.stat().st_mtime_ns
    build.kernels.cache_clear()
    monkeypatch.setattr(build, "_compile", None)  # calling it would fail
    assert works(build.kernels())
    assert libraries() == [library]
    assert library.stat().st_mtime_ns == written


def test_without_a_compiler_one_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.kernels() is None
    assert build.kernels() is None
    assert "install" in warning_of(caplog)
    assert "gcc" in warning_of(caplog)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "#!/bin/sh\nif [ $1 = --version ]; then echo 1; exit; fi\necho 'x.c:1: error: no such thing' >&2\nexit 1\n",
            "no such thing",
        ),
        ("#!/bin/sh\nexit 3\n", "exit code 3"),
        ("#!/bin/sh\nexit 0\n", "left no library behind"),
        ("#!/nowhere/sh\n", "does not run"),
    ],
)
def test_a_broken_compiler_is_named_with_its_reason(
    script: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_compiler(monkeypatch, tmp_path / "bin", script)
    assert build.kernels() is None
    assert reason in warning_of(caplog)
    assert str(tmp_path / "bin" / "gcc") in warning_of(caplog)
    assert libraries() == []


def test_a_compiler_that_writes_nonsense_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The third and later words of the link command are the object, -o and the library."""
    pretend_compiler(monkeypatch, tmp_path / "bin", '#!/bin/sh\nif [ "$1" = -shared ]; then echo nonsense > "$4"; fi\n')
    assert build.kernels() is None
    assert "do not load" in warning_of(caplog)


@pytest.mark.parametrize("damage", ["half", "nothing", "nonsense", "one byte"])
def test_a_damaged_library_is_compiled_again(damage: str) -> None:
    assert works(build.kernels())
    (library,) = libraries()
    whole = library.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    # A new file: writing into the loaded one would damage this process.
    library.unlink()
    library.write_bytes({"half": whole[: len(whole) // 2], "nothing": b"", "nonsense": b"nonsense", "one byte": changed}[damage])
    build.kernels.cache_clear()
    assert works(build.kernels())
    assert library.read_bytes() == whole


def test_another_source_or_processor_means_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    assert compiler is not None
    runtime = build._openmp_runtime()
    keys = {build._key(compiler, runtime, build.SOURCES), build._key(compiler, None, build.SOURCES)}
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    keys.add(build._key(compiler, runtime, build.SOURCES))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    keys.add(build._key(compiler, runtime, build.SOURCES))
    keys.add(build._key(compiler, runtime, build.SOURCES[1:]))
    assert len(keys) == 5


def test_where_nothing_can_be_kept_kernels_are_compiled_for_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A home that is a file stands for every place where nothing can be written; root may write to all others."""
    caplog.set_level(logging.INFO, "finback")
    (tmp_path / ".cache").write_text("in the way", encoding="utf-8")
    assert works(build.kernels())
    assert any("this run only" in record.getMessage() for record in caplog.records)
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_directory_is_no_obstacle(tmp_path: Path) -> None:
    build.cache_directory().mkdir(parents=True)
    build.cache_directory().chmod(0o500)
    try:
        assert works(build.kernels())
        assert libraries() == []
    finally:
        build.cache_directory().chmod(0o700)


def test_two_processes_compile_at_once_without_harm() -> None:
    program = """
from finback.ops.native import build
from tests.ops.native import test_build
build.FLAGS = test_build.UNOPTIMISED
print(test_build.works(build.kernels()))
"""
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [output.strip() for output in outputs] == ["True", "True"]
    (library,) = libraries()
    assert re.fullmatch(r"[0-9a-f]{64}\.so", library.name)
    assert works(build.kernels())


def test_kernels_share_the_threads_of_torch() -> None:
    """One OpenMP runtime in the process: a second one would bring threads that fight with torch's."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not tell what is loaded")
    text = maps.read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in text.splitlines() if re.search(r"/lib(g|i)omp[^/]*\.so", line)}) == 1
