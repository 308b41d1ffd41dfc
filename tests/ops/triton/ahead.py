"""PTX of kernels for sm_90, from one process without the interpreter: importing torch and Triton takes longer than most kernels."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
WIDE = re.compile(r"(ld|st)\.global\S*\.v4\.b32|(ld|st)\.global\S*\.v2\.b64|cp\.async\S* \[[^\]]*\], \[[^\]]*\], 0x10")


def request(
    module: str,
    kernel: str,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    divisible: tuple[str, ...] | None = None,
    warps: int = 4,
    stages: int = 3,
) -> dict[str, Any]:
    """One kernel to compile. Unless told, every argument that is a pointer or an integer is known to be divisible by 16."""
    if divisible is None:
        divisible = tuple(name for name, kind in types.items() if kind[0] in "*i")
    return {
        "module": f"finback.ops.triton.{module}",
        "kernel": kernel,
        "types": types,
        "constants": constants,
        "divisible": divisible,
        "warps": warps,
        "stages": stages,
    }


@contextmanager
def compiler(cache: Path) -> Iterator[Callable[[list[dict[str, Any]]], list[str]]]:
    """A function that gives the PTX of each request; its process ends with the block."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache / "kernels"), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(Path(__file__).with_name("compile_ahead.py"))]
    complaints = cache / "stderr"
    with (
        complaints.open("w") as stderr,
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def compile_for_hopper(requests: list[dict[str, Any]]) -> list[str]:
            assert process.poll() is None, complaints.read_text()[-3000:]
            print(json.dumps(requests), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, complaints.read_text()[-3000:]
            answers: list[str] = json.loads(line)
            return answers

        yield compile_for_hopper


def has_wide_accesses(ptx: str) -> bool:
    """Whether memory is read or written 16 bytes at a time."""
    return WIDE.search(ptx) is not None
