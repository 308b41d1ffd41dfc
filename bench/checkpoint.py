"""Loading and saving a model beside safetensors' own load_file and save_file of the same tensors."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contest import alternate, summarize
from bench.peers import our_model
from bench.results import Row
from finback.config import ModelConfig
from finback.model.checkpoint import hf_tensors, load, save
from finback.presets import small

_FILE = "model.safetensors"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    config: ModelConfig = small().model
    precisions: tuple[str, ...] = ("bf16", "fp32")
    warm_up: int = 1
    turns: int = 5


FULL: Size = Size()
QUICK: Size = Size(precisions=("bf16",), turns=2)


def run(size: Size) -> tuple[list[Row], list[str]]:
    """Rows for saving, loading from the page cache and loading from the disk."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="finback-bench-") as name:
        directory = Path(name)
        for precision in size.precisions:
            rows += _plain_rows(size, directory, precision)
        rows += _fp8_rows(size, directory)
    return rows, _notes()


def _plain_rows(size: Size, directory: Path, precision: str) -> list[Row]:
    dtype = _DTYPES[precision]
    model = our_model(size.config, dtype)
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(model)}
    # safetensors refuses tensors that share memory; MTP layers share embedding and head, and files repeat them.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    ours, theirs = directory / f"ours-{precision}", directory / f"theirs-{precision}.safetensors"
    save(model, ours)
    _save_file(tensors, theirs)
    loaded = load(ours, dtype=dtype)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in hf_tensors(loaded)), "a loaded tensor differs"
    del loaded

    contests: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "save": (lambda: save(model, ours), lambda: _save_file(tensors, theirs)),
        "load, page cache warm": (lambda: load(ours, dtype=dtype), lambda: _load_file(theirs)),
        "load, page cache cold": (lambda: load(ours, dtype=dtype), lambda: _load_file(theirs)),
    }
    rows = []
    for what, (mine, other) in contests.items():
        prepare = (lambda: _forget(ours / _FILE, theirs)) if what.endswith("cold") else (lambda: None)
        names = ("finback", "safetensors, with fsync" if what == "save" else "safetensors")
        rows.append(_contest(size, f"{what}, {precision}", (ours / _FILE).stat().st_size, names, mine, other, prepare))
    shutil.rmtree(ours)
    theirs.unlink()
    return rows


def _fp8_rows(size: Size, directory: Path) -> list[Row]:
    """DeepSeek's FP8 layout: we also quantise and dequantise, safetensors moves the bytes."""
    ours = directory / "ours-fp8"
    model = our_model(size.config, torch.bfloat16)
    save(model, ours, fp8=True)
    theirs = directory / "theirs-fp8.safetensors"
    stored = _load_file(ours / _FILE)
    _save_file(stored, theirs)
    file_bytes = (ours / _FILE).stat().st_size

    def nothing() -> None: ...

    peer = "safetensors, bytes only"
    return [
        _contest(size, "save, FP8 from bf16", file_bytes, ("finback", f"{peer}, with fsync"), lambda: save(model, ours, fp8=True),
                 lambda: _save_file(stored, theirs), nothing),
        _contest(size, "load, page cache warm, FP8 to bf16", file_bytes, ("finback", peer), lambda: load(ours, dtype=torch.bfloat16),
                 lambda: _load_file(theirs), nothing),
    ]  # fmt: skip


def _contest(
    size: Size,
    name: str,
    file_bytes: int,
    names: tuple[str, str],
    mine: Callable[[], Any],
    other: Callable[[], Any],
    prepare: Callable[[], None],
) -> Row:
    """Both in turns. The clock runs inside, so that `prepare` is not timed."""

    def competitor(work: Callable[[], Any]) -> Callable[[], Callable[[Any], float]]:
        def turn(item: Any) -> float:
            prepare()
            return _seconds(work)

        return lambda: turn

    turns = alternate({"finback": competitor(mine), "peer": competitor(other)}, range(size.warm_up + size.turns), separate=False)
    speeds = [summarize([file_bytes / 1e9 / turn.value for turn in turns[key][size.warm_up :]]) for key in ("finback", "peer")]
    seconds = {"seconds": file_bytes / 1e9 / speeds[0].median, "peer_seconds": file_bytes / 1e9 / speeds[1].median}
    floor = {"megabytes": file_bytes / 1e6}
    return Row(name, "gb_per_second", *speeds[0], names[1], *speeds[1], floor=floor, extra=seconds)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _load_file(path: Path) -> dict[str, Tensor]:
    """load_file only maps the file; the tensors are in memory once they are copied out of it, as ours are after `load`."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """save_file, and the wait for the disk that our `save` includes."""
    from safetensors.torch import save_file

    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _forget(*paths: Path) -> None:
    """Drop the files from the page cache, where the system can."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _notes() -> list[str]:
    return [
        "The preset small with its MTP layer, in one file; the loaded tensors were compared. GB of file per second of the whole call.",
        "safetensors: load_file and a copy of each tensor out of the mapped file (our load leaves them in memory, too); save_file "
        "and fsync (our save waits for the disk, too). Cold: the files were dropped from the page cache before.",
        "FP8: finback quantises and dequantises, safetensors only moves the bytes; the difference is the price of the format.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("checkpoint")
