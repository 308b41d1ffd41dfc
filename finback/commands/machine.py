"""What the machine under us is: cores, memory, disk, CPU flags, installed packages and tools, and its torch."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import finback
from finback.ops.memory import host_memory

PROBE_TIMEOUT_SECONDS = 120  # a cold import of torch from a slow disk takes tens of seconds

# our name of a CPU feature -> the kernel's word in /proc/cpuinfo
X86_FLAGS = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
ARM_FLAGS = {"neon": "asimd", "arm_bf16": "bf16", "arm_sve": "sve"}


def read_hardware(disk_path: Path) -> dict[str, Any]:
    """Cores, memory, disk and CPU flags. What a container may use counts, not its host's; None where nothing tells."""
    cpuinfo = _text(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    total, available = host_memory()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "load_average_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_flags": cpu_flags(cpuinfo),
        "memory_total_bytes": total,
        "memory_available_bytes": available,
        "disk_path": str(disk_path),
        "disk_free_bytes": shutil.disk_usage(disk_path).free,
    }


def usable_cores() -> int:
    """Cores this process may run on: its affinity mask, cut by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def cpu_flags(cpuinfo: str) -> dict[str, bool] | None:
    """Which of the vector and matrix extensions that torch uses this CPU has; None where there is no /proc/cpuinfo."""
    line = re.search(r"^(flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if line is None:
        return None
    words = set(line[2].split())
    return {name: word in words for name, word in (X86_FLAGS if line[1] == "flags" else ARM_FLAGS).items()}


def read_packages() -> list[dict[str, Any]]:
    """Every package finback asks for: its name, the group that brings it ("core" or an extra), its version or None."""
    rows = []
    for requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name is None or name[0] == "finback":
            continue
        rows.append({"name": name[0], "group": extra[1] if extra else "core", "version": _version(name[0])})
    return rows


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("finback") or []
    except importlib.metadata.PackageNotFoundError:
        pass  # a source tree that was never installed: its pyproject.toml says the same
    pyproject = Path(finback.__file__).parents[1] / "pyproject.toml"
    if not pyproject.is_file():
        return []
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [
        *project["dependencies"],
        *(f'{requirement}; extra == "{extra}"' for extra, group in extras.items() for requirement in group),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_tools() -> dict[str, Any]:
    """Programs found on this machine, as paths or None. Nothing is started and nothing is fetched."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    here = Path(sys.executable).parent
    return {
        "cxx_compiler": next((path for name in compilers if name and (path := shutil.which(name))), None),
        "python_headers": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "torchrun": shutil.which("torchrun", path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}"),
        "nvidia_smi": shutil.which("nvidia-smi"),
        "pip": importlib.util.find_spec("pip") is not None,
        "npm": shutil.which("npm"),
        "apt_get": shutil.which("apt-get"),
        "triton": _version("triton"),
    }


def read_code_sandbox() -> dict[str, Any]:
    """Where bubblewrap is, why programs cannot run in it or None (one is tried), and the languages that tests can be in."""
    from finback.rewards.bubblewrap import find_bubblewrap
    from finback.rewards.code import COMPILERS, find_compiler
    from finback.rewards.sandbox import obstacle

    languages = ["python", *(language for language in COMPILERS if find_compiler(language))]
    return {"bubblewrap": find_bubblewrap(), "obstacle": obstacle("bubblewrap"), "languages": languages}


def read_torch() -> dict[str, Any]:
    """Torch's facts from a process of its own (`torch_probe.py`), or an `error` in words if it is missing or broken."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return {"error": "not installed"}
    program = Path(__file__).with_name("torch_probe.py")
    try:
        # -P: the program's own folder stays off the import path, where its neighbours could hide a library's modules
        done = subprocess.run(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"installed, but did not answer within {PROBE_TIMEOUT_SECONDS} seconds"}
    if done.returncode < 0:
        return {"error": f"installed, but crashed with signal {-done.returncode} (built for another kind of CPU?)"}
    if done.returncode > 0:
        last_words = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"installed, but does not work: {last_words[-1]}"}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"error": None, **facts}


def _text(path: Path) -> str:
    """The file's text, or nothing where the system has no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
