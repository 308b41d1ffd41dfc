"""How much memory there is. No torch is loaded to look at the host's."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
