"""What this machine can do at most: matrix products, memory, and the product of a cold matrix with one row."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.machine import caches_kib
from bench.results import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int, int]  # rows, inner, columns


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shapes: tuple[Shape, ...] = ((2048, 2048, 2048), (1024, 1024, 1024), (512, 512, 512), (4096, 256, 1024), (256, 256, 256))
    convolution_shape: Shape = (4096, 256, 1024)
    seconds: float = 0.5  # for each number
    memory_bytes: int = 1 << 29  # of one array: far larger than any cache
    gemv_shape: tuple[int, int] = (8192, 2048)


FULL: Size = Size()
QUICK: Size = Size(seconds=0.15, memory_bytes=1 << 28)
TOY: Size = Size(shapes=((64, 64, 64),), convolution_shape=(64, 64, 64), seconds=0.001, memory_bytes=1 << 16, gemv_shape=(64, 32))


class Ceilings(NamedTuple):
    """What other benchmarks divide by. GFLOP/s with the shape that reaches them, and GB/s from memory."""

    matmul_gflop_per_second: dict[str, float]
    matmul_shape: dict[str, Shape]
    read_gb_per_second: float


def run(size: Size) -> tuple[list[Row], Ceilings]:
    """All ceilings, each the best of its repetitions."""
    rows, best, shapes = [], {}, {}
    for precision, dtype in DTYPES.items():
        rates = {shape: matmul_rate(shape, dtype, size.seconds) for shape in size.shapes}
        shapes[precision] = max(rates, key=lambda shape: rates[shape])
        convolution = convolution_rate(size.convolution_shape, dtype, size.seconds)
        best[precision] = max(rates[shapes[precision]], convolution)
        for shape, rate in rates.items():
            mark = ", the ceiling" if rate == best[precision] else ""
            floor = {"gflop": flops(shape) / 1e9}
            rows.append(Row(f"matmul {precision} {'x'.join(map(str, shape))}{mark}", "gflop_per_second", rate, floor=floor))
        shape = size.convolution_shape
        name = f"1x1 convolution {precision} {'x'.join(map(str, shape))}" + ", the ceiling" * (convolution == best[precision])
        rows.append(Row(name, "gflop_per_second", convolution, floor={"gflop": flops(shape) / 1e9}))
    read, copy = memory_rates(size.memory_bytes, size.seconds)
    megabytes = {"megabytes": size.memory_bytes / 1e6}
    rows.append(Row("memory, read", "gb_per_second", read, floor=megabytes))
    rows.append(Row("memory, copy (read + written)", "gb_per_second", copy, floor={"megabytes": 2 * size.memory_bytes / 1e6}))
    for precision, dtype in DTYPES.items():
        milliseconds = cold_gemv(size.gemv_shape, dtype, size.seconds)
        traffic = size.gemv_shape[0] * size.gemv_shape[1] * dtype.itemsize / 1e6
        floor = {"megabytes": traffic, "milliseconds": traffic / read}
        shape_text = "x".join(map(str, size.gemv_shape))
        rows.append(Row(f"cold {shape_text} times one row, {precision}", "milliseconds", milliseconds, floor=floor))
    return rows, Ceilings(best, shapes, read)


def notes() -> list[str]:
    return [
        "Best of the repetitions. Matrix products of several shapes, because small ones stay in cache and large ones use the "
        "cores better; the best of them is a ceiling.",
        "The 1x1 convolution goes to oneDNN; plain fp32 products go to the library of torch's build (MKL on x86), which need not use "
        "the widest instructions of another maker's processor. The better of the two is the ceiling, and our float32 products take it.",
        "Read: the sum of an array far larger than the caches. Cold: the matrix is one of several, so that none is in cache when "
        "its turn comes.",
    ]


def flops(shape: Shape) -> float:
    rows, inner, columns = shape
    return 2.0 * rows * inner * columns


def matmul_rate(shape: Shape, dtype: torch.dtype, seconds: float) -> float:
    """The best GFLOP/s of X W^T, X [rows, inner], W [columns, inner], over about so many seconds."""
    rows, inner, columns = shape
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return flops(shape) / best_seconds(lambda: torch.nn.functional.linear(x, weight), seconds) / 1e9


def convolution_rate(shape: Shape, dtype: torch.dtype, seconds: float) -> float:
    """The best GFLOP/s of the same product, written as a convolution with a 1x1 kernel over an image of rows x 1 pixels."""
    rows, inner, columns = shape
    image = torch.randn(1, rows, 1, inner).to(dtype).permute(0, 3, 1, 2)
    kernel = torch.randn(columns, inner, 1, 1).to(dtype)
    return flops(shape) / best_seconds(lambda: torch.nn.functional.conv2d(image, kernel), seconds) / 1e9


def memory_rates(size_bytes: int, seconds: float) -> tuple[float, float]:
    """GB/s of reading an array, and of copying it (both directions counted)."""
    source = torch.ones(size_bytes // 4)
    target = torch.empty_like(source)
    read = size_bytes / best_seconds(source.sum, seconds) / 1e9
    copy = 2 * size_bytes / best_seconds(lambda: target.copy_(source), seconds) / 1e9
    return read, copy


def cold_gemv(shape: tuple[int, int], dtype: torch.dtype, seconds: float) -> float:
    """Milliseconds of W x for a W [rows, columns] that is not in cache, x one row."""
    rows, columns = shape
    last_level = 1024 * max(caches_kib().values(), default=32 * 1024)
    count = max(2, -(-2 * last_level // (rows * columns * dtype.itemsize)) + 1)
    matrices = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
    x = torch.randn(1, columns).to(dtype)
    turn = 0

    def product() -> torch.Tensor:
        nonlocal turn
        turn += 1
        return torch.nn.functional.linear(x, matrices[turn % count])

    return 1e3 * best_seconds(product, seconds)


def best_seconds(work: Callable[[], object], seconds: float) -> float:
    """The shortest of the repetitions that fit into so many seconds, at least five, after a first one that does not count."""
    work()
    best, repetitions, deadline = float("inf"), 0, time.perf_counter() + seconds
    while repetitions < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        repetitions += 1
    return best


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("ceilings")
