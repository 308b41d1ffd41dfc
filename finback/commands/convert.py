"""`finback convert`: rewrite a checkpoint in another dtype, or between FP8 and plain weights, without building the model."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError, checkpoint_tensors

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class ConvertFields:
    """What `finback convert` takes."""

    source: Positional[Path]
    """Hugging Face directory to read; FP8 ones (weight_scale_inv) included."""
    out: Positional[Path]
    """Hugging Face directory to write; it must not exist yet, or be empty."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights that are not stored as FP8; that of the source if not given."""
    fp8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store projections as FP8 with a scale per 128 x 128 block; without it, FP8 weights become plain ones."""


def main(argv: list[str]) -> int:
    """`finback convert SOURCE OUT [--dtype float32|bfloat16] [--fp8]`."""
    fields = parse_arguments(
        ConvertFields,
        argv,
        verb="convert",
        description="Rewrite a Hugging Face checkpoint in another dtype, to FP8 or from FP8, tensor by tensor.",
    )
    if fields.out.suffix == ".gguf":
        raise InputError(f"OUT is {fields.out}, but GGUF files are not written yet; give a directory")
    if fields.out.exists() and not (fields.out.is_dir() and not any(fields.out.iterdir())):
        raise InputError(f"OUT {fields.out} exists and is not empty; give a new directory")

    from finback.model.checkpoint import converted, open_checkpoint, write_checkpoint
    from finback.model.safetensors_io import tensor_bytes

    source = open_checkpoint(fields.source)
    config = replace(source.config, torch_dtype=fields.dtype or source.config.torch_dtype, fp8=fields.fp8)
    total = sum(map(tensor_bytes, checkpoint_tensors(config)))
    write_checkpoint(fields.out, config, _with_progress(converted(source, config), total), tokenizer_from=fields.source)
    weights = f"FP8 blocks, the rest {config.torch_dtype}" if config.fp8 else config.torch_dtype
    print(f"{fields.out}: {weights}, {total / 1e6:,.1f} MB")
    return 0


def _with_progress(tensors: Iterator[tuple[str, "Tensor"]], total: int) -> Iterator[tuple[str, "Tensor"]]:
    """Pass tensors on and tell on stderr how many of `total` bytes went by: a bar on a terminal, else a line at times."""
    columns = (*Progress.get_default_columns()[:-1], DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("converting", total=total)
        done, told = 0, time.monotonic()
        for name, tensor in tensors:
            yield name, tensor
            done += tensor.nbytes
            progress.update(task, completed=done)
            if progress.disable and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                print(f"{done / total:.0%}, {name}", file=sys.stderr, flush=True)
                told = time.monotonic()
