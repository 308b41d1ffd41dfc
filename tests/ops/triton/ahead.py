"""PTX of kernels for sm_90, from a process without the interpreter."""

import json
import os
import re
import subprocess
import sys
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


def compile_for_hopper(requests: list[dict[str, Any]], cache: Path) -> list[str]:
    """The PTX of each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_ahead.py"))],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[str] = json.loads(done.stdout)
    return answers


def has_wide_accesses(ptx: str) -> bool:
    """Whether memory is read or written 16 bytes at a time."""
    return WIDE.search(ptx) is not None
