from importlib import import_module
from typing import Any

_PUBLIC = {"fp8_gemm": "fp8_product", "quantize_1x128": "fp8", "quantize_128x128": "fp8"}


def __getattr__(name: str) -> Any:
    """The public functions, found on first use: `finback.ops` alone imports no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
