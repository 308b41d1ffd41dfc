"""How much memory a tree of processes holds, as /proc tells it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path


def exceeds_memory(first: int | None, limit_bytes: int) -> bool:
    """Whether process `first` and all below it hold more resident memory together; pages that they share count once."""
    processes = [] if first is None else list(_descendants(first))
    for file, label in (("status", "VmRSS:"), ("smaps_rollup", "Pss:")):  # the second is exact and costs more
        if sum(_read_kib(process, file, label) for process in processes) * 1024 <= limit_bytes:
            return False
    return True


def _descendants(process: int) -> Iterator[int]:
    """`process` and all below it, once each even while they fork."""
    waiting, seen = [process], {process}
    while waiting:
        parent = waiting.pop()
        yield parent
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text().split()
                new = {int(child) for child in children} - seen
                seen |= new
                waiting += new
        except OSError:
            continue  # it has just ended


def _read_kib(process: int, file: str, label: str) -> int:
    try:
        text = Path(f"/proc/{process}/{file}").read_text()
    except OSError:
        return 0  # it has just ended
    found = re.search(rf"^{label}\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) if found else 0
