"""How much memory there is."""

import os
import re
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int | None:
    """Bytes that a run can still take on `device`; None where nothing tells. In a container its limit counts, not the host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    kib = re.search(r"^MemAvailable:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    available = int(kib[1]) * 1024 if kib else None
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        room = max(0, int(limit) - int(used))
        return room if available is None else min(available, room)
    if available is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
