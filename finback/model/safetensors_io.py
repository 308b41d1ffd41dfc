"""Safetensors files, read and written one tensor at a time.

The format is eight bytes with the header's length, a JSON header (name -> dtype, shape, byte range), then the data. The
`safetensors` library maps whole files into memory, and mapped pages count as the process's own: loading a model with it
shows twice its size. Here bytes go from the file straight into the tensor they belong to, and from a tensor straight
into the file, so a tensor that is cast on the way is the only copy that ever exists. Copying between the page cache and
tensors is bound by one core, so reads are shared out among threads, and the disk is kept busy while a file is being written.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finback.config import DTYPE_BYTES, InputError, TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
}
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the library's own bound
_COMPARE_BYTES = 1 << 22
_READ_BYTES = 1 << 22  # what a thread reads at a time
_MOST_READERS = 4
_SYNC_BYTES = 1 << 26  # what is written before the disk is asked to begin


class StoredTensor(NamedTuple):
    """Where one tensor lies: bytes [start, stop) of `file`. `dtype` is the format's name, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_catalog(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face directory, from `model.safetensors` or from the shards its index lists.

    Reads headers only. Raises InputError naming the file or tensor where a file is missing, truncated or no safetensors
    file, and where index and shards disagree.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise InputError(f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is stale")
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise InputError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory with safetensors")
    weight_map = _read_index(index)
    catalog: dict[str, StoredTensor] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        path = directory / file_name
        if not path.is_file():
            example = next(name for name, file in weight_map.items() if file == file_name)
            raise InputError(f"{path} is missing, which {index.name} names for {example}; fetch it again")
        for name, stored in read_header(path).items():
            if weight_map.get(name) != file_name:
                listed = f"places in {weight_map[name]}" if name in weight_map else "does not list"
                raise InputError(f"{path} holds {name}, which {index.name} {listed}; fetch both files again")
            catalog[name] = stored
    for name, file_name in weight_map.items():
        if name not in catalog:
            raise InputError(f"{directory / file_name} lacks {name}, which {index.name} places there; fetch it again")
    return catalog


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map from tensor names to files; fetch it again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise InputError(f"{path} places {name} in {file_name!r}, which is no file name; fetch it again")
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of its header; InputError naming the file if it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data_start = _LENGTH_BYTES + length
        if size < _LENGTH_BYTES or length > _LARGEST_HEADER:
            raise InputError(f"{path} is not a safetensors file; fetch it again")
        if size < data_start:
            raise InputError(f"{path} is truncated inside its header ({size} of at least {data_start} bytes); fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path} has a damaged header ({error}); fetch it again") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} has a damaged header (no JSON object); fetch it again")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: item[1][3:]):
        if stored.start != end:
            raise InputError(f"{path} is damaged: the bytes of {name} do not follow those before; fetch it again")
        end = stored.stop
    if size < end:
        cut = min((stored.stop, name) for name, stored in tensors.items() if stored.stop > size)[1]
        raise InputError(f"{path} is truncated inside {cut} ({size} of {end} bytes); fetch it again")
    if size > end:
        raise InputError(f"{path} is damaged: {size - end} bytes belong to no tensor; fetch it again")
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and start <= stop
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise InputError(f"{path} has a damaged header (entry {name}); fetch it again")
    if dtype in DTYPE_BYTES and stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise InputError(f"{path} is damaged: {name} has {stop - start} bytes for shape {list(shape)} of {dtype}; fetch it again")
    return StoredTensor(path, dtype, shape, data_start + start, data_start + stop)


class _Piece(NamedTuple):
    """Bytes of a file from `start` on, and where they go."""

    file: Path
    start: int
    buffer: memoryview


class TensorReader:
    """Reads stored tensors by their catalog entries. Keeps the files it has met open until it is closed.

    `read_into` may leave its work to threads: it is done when `wait` returns, or the block has ended.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(min(_MOST_READERS, os.cpu_count() or 1))
        self._collected: list[_Piece] = []
        self._collected_bytes = 0
        self._running: list[Future[None]] = []

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
            for handle in self._files.values():
                os.close(handle)
            self._files.clear()

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor as stored, on the CPU."""
        tensor = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
        self._fill(_Piece(stored.file, stored.start, _bytes_of(tensor)))
        return tensor

    def read_into(self, stored: StoredTensor, destination: Tensor) -> None:
        """Fill `destination`, of the stored shape but any dtype and device; without a copy between where they agree."""
        same = TORCH_DTYPES[stored.dtype] == destination.dtype and destination.device.type == "cpu"
        if not (same and destination.is_contiguous()):
            destination.copy_(self.read(stored))
            return
        self._handle(stored.file)
        buffer = _bytes_of(destination)
        for offset in range(0, len(buffer), _READ_BYTES):
            piece = buffer[offset : offset + _READ_BYTES]
            self._collected.append(_Piece(stored.file, stored.start + offset, piece))
            self._collected_bytes += len(piece)
            if self._collected_bytes >= _READ_BYTES:
                self._hand_over()

    def wait(self) -> None:
        """Until everything is read; raises what went wrong."""
        self._hand_over()
        while self._running:
            self._running.pop().result()

    def holds(self, stored: StoredTensor, tensor: Tensor) -> bool:
        """Whether a stored tensor has the bits of one in memory, of the same shape; compares a few MiB at a time."""
        if TORCH_DTYPES[stored.dtype] != tensor.dtype:
            return False
        bits = tensor.view(-1).view(torch.uint8)
        for offset in range(0, stored.stop - stored.start, _COMPARE_BYTES):
            there = bits[offset : offset + _COMPARE_BYTES]
            here = torch.empty_like(there, device="cpu")
            self._fill(_Piece(stored.file, stored.start + offset, _bytes_of(here)))
            if not torch.equal(here, there.cpu()):
                return False
        return True

    def same_bytes(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two stored tensors are equal bit for bit, dtype and shape included; compares a few MiB at a time."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for offset in range(0, one.stop - one.start, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, one.stop - one.start - offset)
            pieces = bytearray(size), bytearray(size)
            for stored, piece in zip((one, other), pieces, strict=True):
                self._fill(_Piece(stored.file, stored.start + offset, memoryview(piece)))
            if pieces[0] != pieces[1]:
                return False
        return True

    def _hand_over(self) -> None:
        """What has been collected becomes one thread's work: many tensors are small."""
        pieces, self._collected, self._collected_bytes = self._collected, [], 0
        if pieces:
            self._running.append(self._pool.submit(self._fill, *pieces))

    def _handle(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _fill(self, *pieces: _Piece) -> None:
        for file, start, buffer in pieces:
            done = 0
            while done < len(buffer):
                count = os.preadv(self._handle(file), [buffer[done:]], start + done)
                if not count:
                    raise InputError(f"{file} has become shorter while it was read; fetch it again")
                done += count


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut tensors, in their order, into files of at most `max_shard_bytes`; an FP8 weight and its scales stay together.

    A pair that is larger than that by itself gets a file of its own.
    """
    groups: list[list[TensorSpec]] = []
    for spec in specs:
        if groups and spec.name == groups[-1][0].name + "_scale_inv":
            groups[-1].append(spec)
        else:
            groups.append([spec])
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(map(tensor_bytes, group))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def tensor_bytes(spec: TensorSpec) -> int:
    """Size of a stored tensor."""
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]


def write_safetensors(path: Path, specs: list[TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file: take the tensors of `specs` from `tensors`, in that order, and put each in its place.

    Wider dtypes come first in the file, so that every tensor starts at a multiple of its element size. The file is
    complete and on the disk when this returns; `path` must not exist.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in sorted(specs, key=lambda spec: -DTYPE_BYTES[spec.dtype]):
        start, end = end, end + tensor_bytes(spec)
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("xb") as file, ThreadPoolExecutor(1) as pool:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        unsynced, syncing = 0, Future[None]()
        syncing.set_result(None)
        for spec in specs:
            name, tensor = next(tensors)
            stored = (name, tuple(tensor.shape), tensor.dtype)
            assert stored == (spec.name, spec.shape, TORCH_DTYPES[spec.dtype]), f"{stored} given, {spec} planned"
            file.seek(_LENGTH_BYTES + len(text) + header[name]["data_offsets"][0])
            file.write(_bytes_of(tensor.detach().cpu().contiguous()))
            unsynced += tensor_bytes(spec)
            if unsynced >= _SYNC_BYTES and syncing.done():  # the disk works while the next tensors are made and copied
                syncing.result()
                unsynced, syncing = 0, pool.submit(os.fsync, file.fileno())
        syncing.result()
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
