"""What this machine's torch is and can do, printed as one JSON line. `finback doctor` runs this file as a program.

It runs in a process of its own, because a torch that does not fit its machine may fail in any way: an ImportError, a
missing shared library, an illegal instruction, a hang. Doctor then reports the failure instead of sharing it. Nothing
here imports finback, and torch is imported inside the functions, so that its warnings at import are caught as well.
"""

import json
import time
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MEASURE_SECONDS = 0.2  # for each device, dtype and number of threads


def matmul_gflop_per_second(device: str, dtype: "torch.dtype") -> float:
    """The best rate of a square matrix product, with all threads or with one.

    With one too, because beside a busy neighbour two threads that wait for each other can be far slower than one.
    """
    import torch

    all_threads = torch.get_num_threads()
    best = 0.0
    for threads in {1, all_threads} if device == "cpu" else {all_threads}:
        torch.set_num_threads(threads)
        best = max(best, _best_rate(device, dtype))
    torch.set_num_threads(all_threads)
    return best


def _best_rate(device: str, dtype: "torch.dtype") -> float:
    """GFLOP/s with the threads that are set; small matrices first, so that a slow machine stays quick."""
    size = 256
    largest = 1024 if device == "cpu" else 8192
    while size < largest and _seconds(size, device, dtype) < MEASURE_SECONDS / 50:
        size *= 2
    best = _seconds(size, device, dtype)
    deadline = time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < deadline:
        best = min(best, _seconds(size, device, dtype))
    return 2 * size**3 / best / 1e9


def _seconds(size: int, device: str, dtype: "torch.dtype") -> float:
    import torch

    from finback.ops.products import mm

    matrix = torch.randn(size, size, device=device).to(dtype)
    mm(matrix, matrix)
    _wait(device)
    start = time.perf_counter()
    mm(matrix, matrix)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def gpus() -> list[dict[str, object]]:
    """Name, memory and measured matmul rate of each CUDA (or ROCm) device that torch sees."""
    import torch

    rows: list[dict[str, object]] = []
    if not torch.cuda.is_available():
        return rows
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        rows.append(
            {
                "name": torch.cuda.get_device_name(index),
                "memory_total_bytes": total,
                "memory_free_bytes": free,
                "compute_capability": f"{major}.{minor}",
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    return rows


def probe() -> dict[str, object]:
    """Everything doctor wants to know from torch; warnings that torch gave on the way are part of the answer."""
    import torch

    build = "cpu"
    if torch.version.cuda:
        build = f"cuda {torch.version.cuda}"
    elif torch.version.hip:
        build = f"rocm {torch.version.hip}"
    distributed = torch.distributed.is_available()
    found = gpus()
    device = "cuda" if found else "cpu"
    return {
        "version": torch.__version__,
        "build": build,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gloo": distributed and torch.distributed.is_gloo_available(),
        "nccl": distributed and torch.distributed.is_nccl_available(),
        "gpus": found,
        "matmul": {
            "device": device,
            "fp32_gflop_per_second": round(matmul_gflop_per_second(device, torch.float32), 1),
            "bf16_gflop_per_second": round(matmul_gflop_per_second(device, torch.bfloat16), 1),
        },
    }


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = probe()
    print(json.dumps({**facts, "warnings": [str(warning.message) for warning in caught]}))
