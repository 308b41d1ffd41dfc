"""`finback convert`: rewrite a checkpoint in another dtype, between FP8 and plain weights, or as a GGUF file for llama.cpp and
Ollama, without building the model."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
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
    """Hugging Face directory to write, which must not exist yet or be empty; or a name that ends in .gguf, for a GGUF file and a
    Modelfile beside it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that are not stored as FP8; that of the source if not given. float16 is for GGUF files."""
    fp8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store projections as FP8 with a scale per 128 x 128 block; without it, FP8 weights become plain ones."""


def main(argv: list[str]) -> int:
    """`finback convert SOURCE OUT [--dtype float32|bfloat16] [--fp8]`."""
    fields = parse_arguments(
        ConvertFields,
        argv,
        verb="convert",
        description="Rewrite a Hugging Face checkpoint in another dtype, to FP8 or from FP8, or as GGUF, tensor by tensor.",
    )
    if fields.out.suffix == ".gguf":
        return _to_gguf(fields)
    if fields.out.exists() and not (fields.out.is_dir() and not any(fields.out.iterdir())):
        raise InputError(f"OUT {fields.out} exists and is not empty; give a new directory")
    if fields.dtype == "float16":
        raise InputError("--dtype is float16, which only GGUF files are written in; choose float32 or bfloat16")

    from finback.model.checkpoint import converted, open_checkpoint, write_checkpoint
    from finback.model.safetensors_io import tensor_bytes

    source = open_checkpoint(fields.source)
    config = replace(source.config, torch_dtype=fields.dtype or source.config.torch_dtype, fp8=fields.fp8)
    total = sum(map(tensor_bytes, checkpoint_tensors(config)))
    write_checkpoint(fields.out, config, _with_progress(converted(source, config), total), tokenizer_from=fields.source)
    weights = f"FP8 blocks, the rest {config.torch_dtype}" if config.fp8 else config.torch_dtype
    print(f"{fields.out}: {weights}, {total / 1e6:,.1f} MB")
    return 0


def _to_gguf(fields: ConvertFields) -> int:
    """Write the GGUF file, then the Modelfile beside it."""
    modelfile_path = fields.out.parent / "Modelfile"
    for path in (fields.out, modelfile_path):
        if path.exists():
            raise InputError(f"{path} exists; move it away, or give OUT in another directory")
    if fields.fp8:
        raise InputError(
            "--fp8 is for directories, GGUF has no such type; choose a --dtype, and let llama-quantize make it smaller"
        )
    if find_spec("gguf") is None:
        raise InputError("writing GGUF files needs the package gguf; install finback[data]")

    from finback.data.files import read_json, write_atomic
    from finback.data.gguf_tokenizer import tokenizer_metadata
    from finback.data.modelfile import modelfile
    from finback.data.tokenizer import load_tokenizer
    from finback.model.checkpoint import converted, open_checkpoint
    from finback.model.gguf import write_gguf
    from finback.model.gguf_layout import check_exportable, hyperparameters, without_mtp
    from finback.model.safetensors_io import tensor_bytes

    source = open_checkpoint(fields.source)
    check_exportable(source.config)
    tokenizer = load_tokenizer(fields.source)
    metadata = {"general.name": fields.source.resolve().name, **hyperparameters(source.config)}
    metadata |= tokenizer_metadata(tokenizer, source.config.vocab_size)
    dtype = fields.dtype or source.config.torch_dtype
    # Read in float32, so that what is stored as float32 was never rounded to anything shorter than its source.
    config = replace(without_mtp(source.config), torch_dtype="float32", fp8=False)
    total = sum(map(tensor_bytes, checkpoint_tensors(config)))
    generation_file = fields.source / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    beside = modelfile(fields.out.name, tokenizer, config.max_position_embeddings, generation)
    write_gguf(fields.out, config, dtype, metadata, _with_progress(converted(source, config), total))
    write_atomic(modelfile_path, beside)
    left_out = "; its MTP layers are left out, llama.cpp has none for it" if source.config.num_nextn_predict_layers else ""
    print(f"{fields.out}: {dtype}, {fields.out.stat().st_size / 1e6:,.1f} MB, with a Modelfile for Ollama beside it{left_out}")
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
