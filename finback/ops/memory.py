"""How much memory there is, and memory in large pages. No torch is loaded to look at the host's."""

import contextlib
import math
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ARE_LARGE = hasattr(mmap, "MADV_HUGEPAGE")
_LINE = 64  # bytes of the processor's cache
_PIECE = 2**28  # bytes asked for at once; those that are never written are never taken


def available_memory(device: "torch.device") -> int | None:
    """Bytes that a run can still take on `device`; None where nothing tells."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    total, available = host_memory()
    return total if available is None else available


def host_memory() -> tuple[int | None, int | None]:
    """Total and available bytes of this machine; None where nothing tells. In a container its limit counts, not the host's."""
    kib = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE))
    total = int(kib["MemTotal"]) * 1024 if "MemTotal" in kib else None
    available = int(kib["MemAvailable"]) * 1024 if "MemAvailable" in kib else None
    if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit():
        total = int(limit) if total is None else min(total, int(limit))
        if used.isdigit():
            room = max(0, int(limit) - int(used))
            available = room if available is None else min(available, room)
    return total, available


def zeros_in_large_pages(shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
    """Zeros in the host's memory, in pages of 2 MiB where the system gives such, as Linux does, and taken from it only where they are
    written.

    For what every step reads from end to end. A processor reads ahead within a page only, and knows the places of so many pages: at
    one sequence SmolLM2 in bfloat16 decodes by an eighth faster than with its weights in pages of 4 KiB."""
    import torch

    count = math.prod(shape)
    if count == 0 or not _ARE_LARGE:
        return torch.zeros(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages; the memory is as good
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))  # which keeps the pages


class LargePages:
    """Places for many tensors, one behind the other, in memory as `zeros_in_large_pages` gives it."""

    def __init__(self) -> None:
        self._rest: Tensor | None = None  # uint8

    def zeros(self, shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
        """The next place."""
        import torch

        size = math.prod(shape) * dtype.itemsize
        if not _ARE_LARGE:
            return torch.zeros(tuple(shape), dtype=dtype)
        if self._rest is None or len(self._rest) < size:
            self._rest = zeros_in_large_pages((max(size, _PIECE),), torch.uint8)
        place, self._rest = self._rest[:size], self._rest[-(-size // _LINE) * _LINE :]
        return place.view(dtype).view(tuple(shape))

    def copy(self, tensor: "Tensor") -> "Tensor":
        """A tensor's values in the next place."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
