"""Writes GGUF files, which llama.cpp and Ollama read, from a stream of published tensors.

Everything is planned from shapes first (`model/gguf_layout.py`). Then tensors are drawn one by one and written to their places, so a
file of any size needs the memory of one tensor.
"""

import math
import os
import secrets
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.config import DTYPE_BYTES, InputError, ModelConfig, TensorSpec
from finback.model.gguf_layout import Metadata, architecture, computed, gguf_tensors, parts

_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's numbers for files of mostly one type
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZATION_VERSION = 2
_LARGEST_F16 = 65504.0


def write_gguf(path: Path, config: ModelConfig, dtype: str, metadata: Metadata, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a GGUF file from a stream of published (name, tensor) pairs without MTP, in any order and any floating type.

    `metadata` is all but the architecture's name and the file's type; `dtype` is torch's name of the weights' type. The stream is drawn
    one tensor at a time. The file appears whole or not at all. Raises InputError if it exists, does not fit on the disk, or if a value
    does not fit float16.
    """
    specs = gguf_tensors(config, dtype)
    if path.exists():
        raise InputError(f"{path} exists; give a new name")
    path.parent.mkdir(parents=True, exist_ok=True)
    total, free = sum(map(_size, specs)), shutil.disk_usage(path.parent).free
    if free < total:
        raise InputError(f"{path} needs {total / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free; make room, or write elsewhere")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        places, end = _write_header(temporary, architecture(config), specs, dtype, metadata)
        with temporary.open("r+b") as file:
            file.truncate(end)
            missing = {spec.name: math.prod(spec.shape) for spec in specs}
            published = (part for name, tensor in tensors for part in parts(name, tensor.detach().cpu(), config))
            for name, expert, part in chain(published, ((name, None, tensor) for name, tensor in computed(config))):
                start, stored = places[name]
                values = _cast(name, part, stored)
                file.seek(start + (expert or 0) * values.nbytes)
                file.write(values.view(-1).view(torch.uint8).numpy().data)
                missing[name] -= values.numel()
            assert not any(missing.values()), f"not all of {[name for name, count in missing.items() if count]} was given"
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(
    path: Path, kind: str, specs: list[TensorSpec], dtype: str, metadata: Metadata
) -> tuple[dict[str, tuple[int, str]], int]:
    """All before the data. Returns where each tensor starts and its type, and where the file ends."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, kind)
    general = {
        "general.type": "model",
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    for key, value in (general | dict(metadata)).items():
        writer.add_key_value(key, value, _value_type(value))
    for spec in specs:  # the library takes no BF16 of numpy's, and ignores this type where it is told the other
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float16), _size(spec), GGMLQuantizationType[spec.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment: int = writer.data_alignment

    def aligned(offset: int) -> int:
        return -(-offset // alignment) * alignment

    places, end = {}, aligned(path.stat().st_size)
    for spec in specs:
        places[spec.name] = end, spec.dtype
        end = aligned(end + _size(spec))
    return places, end


def _value_type(value: object) -> Any:
    from gguf import GGUFValueType

    types = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32", list: "ARRAY"}
    return GGUFValueType[types[type(value)]]


def _size(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A contiguous tensor of the stored type."""
    if dtype == "F16" and tensor.abs().max() > _LARGEST_F16:
        raise InputError(
            f"{name} holds {tensor.abs().max():g}, beyond float16's {_LARGEST_F16:g}; use --dtype bfloat16 or float32"
        )
    return tensor.to(_TORCH_DTYPES[dtype]).contiguous()
