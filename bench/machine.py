"""What a number was measured on: the device, the commit, and whether the machine was quiet."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from finback.commands.machine import read_hardware

ROOT = Path(__file__).parents[1]
BUSY_LOAD = 0.5  # processes that want a core, averaged over the minute before
_GENERATED = (
    "bench/results",
    "docs/benchmarks.md",
    "docs/images/decode_context.png",
    "README.md",
    "README.zh.md",
)  # what the benchmarks themselves write


def describe_device() -> dict[str, Any]:
    """CPU, caches, memory, and the torch that runs on them."""
    hardware = read_hardware(ROOT)
    cuda, hip = torch.version.cuda, torch.version.hip
    return {
        "cpu": hardware["cpu"],
        "architecture": hardware["architecture"],
        "cores": hardware["cores"],
        "cache_kib": caches_kib(),
        "cpu_flags": hardware["cpu_flags"],
        "memory_total_bytes": hardware["memory_total_bytes"],
        "memory_available_bytes": hardware["memory_available_bytes"],
        "torch": torch.__version__,
        "torch_build": f"cuda {cuda}" if cuda else f"rocm {hip}" if hip else "cpu",
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def caches_kib() -> dict[str, int]:
    """Size of each cache that the first core has, such as {"L1d": 48, "L2": 1024, "L3": 32768}; empty where nothing tells."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction":
            level = (index / "level").read_text().strip()
            sizes[f"L{level}{'d' if kind == 'Data' else ''}"] = int((index / "size").read_text().strip().removesuffix("K"))
    return sizes


def read_commit() -> dict[str, Any]:
    """The commit's hash, and whether tracked or new files differ from it (what the benchmarks write does not count)."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in _GENERATED))
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def read_load() -> dict[str, Any]:
    """The load of the last minute. Numbers from a busy machine are no claims."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"load_average_1_minute_before": load, "busy": None if load is None else load > BUSY_LOAD}


def peak_memory_bytes() -> int | None:
    """The most memory this process has had resident since `reset_peak_memory` (or its start); None where nothing tells."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def reset_peak_memory() -> None:
    """Begin the peak anew at what is resident now, where the kernel can."""
    with suppress(OSError):  # elsewhere the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
