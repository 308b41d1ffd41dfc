"""Triton kernels on a CPU: run by Triton's interpreter in this process, compiled ahead of time for sm_90 in another.

The interpreter is chosen by an environment variable when Triton is imported, which tests/conftest.py sets; the compiler needs the other
kind of kernel, hence a process of its own for all of them. The interpreter reads a kernel's source and its globals:
kernels are imported without the hook that checks shapes elsewhere, which would stand in between.
"""

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ops.triton.ahead import compiler

assert os.environ["TRITON_INTERPRET"] == "1"
pytest.importorskip("triton", reason="Triton is not installed: pip install 'finback[gpu]'")


def _import_kernels() -> None:
    import finback.ops

    hooks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("jaxtyping")]
    for module in pkgutil.iter_modules(finback.ops.__path__):
        if module.name not in ("triton", "native"):
            importlib.import_module(f"finback.ops.{module.name}")
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in hooks]
    try:
        import finback.ops.triton as kernels

        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"finback.ops.triton.{module.name}")
    finally:
        sys.meta_path[:0] = hooks


_import_kernels()


@pytest.fixture(scope="session")
def compile_for_hopper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[dict[str, Any]]], list[str]]]:
    """From requests (`ahead.request`) to their PTX."""
    with compiler(tmp_path_factory.mktemp("hopper")) as compile_them:
        yield compile_them
