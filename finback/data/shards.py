"""Documents as memory-mapped token files.

A shard directory holds, beside `index.json`, numbered files for each split ("train", "validation"):

    train-00000.bin           token ids, little-endian uint16 (uint32 above 65,536 tokens): bos, document, eos, ...
    train-00000.offsets.npy   int64 [documents + 1], where each document starts

The index names every file with its size and SHA-256, so that a truncated or altered one is noticed when it is opened.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from finback.config import InputError
from finback.data.boundary import boundary_table, split_boundaries
from finback.data.config import DataConfig
from finback.data.files import atomic_directory, read_json, write_atomic
from finback.data.fim import fim_document
from finback.data.packing import row_slice
from finback.data.sources import Document
from finback.data.tokenizer import Tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_INDEX = "index.json"
_FORMAT = 1
_DOCUMENTS_AT_ONCE = 256


def write_shards(
    documents: Iterable[Document], tokenizer: Tokenizer, directory: str | Path, config: DataConfig | None = None
) -> dict[str, Any]:
    """Tokenise `documents` into a shard directory and return its index.

    Exact duplicates are written once. A document goes to the validation split by a hash of its text, so the same text
    never lies on both sides. Fill-in-the-middle and boundary splits (V3 section 4.1) touch the training split only.
    The directory appears whole, replacing a former one, or not at all. Raises InputError if no document is left for
    training.
    """
    directory, config = Path(directory), config or DataConfig()
    table = boundary_table(tokenizer) if config.boundary_split_rate > 0 else {}
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    seen: set[bytes] = set()
    sources: Counter[str] = Counter()
    duplicates = 0
    with atomic_directory(directory) as temporary, ExitStack() as stack:
        writers = {
            split: stack.enter_context(closing(_SplitWriter(temporary, split, dtype, config.tokens_per_shard)))
            for split in SPLITS
        }
        for batch in _batches(enumerate(documents)):
            kept: list[tuple[int, Split, str]] = []
            for index, document in batch:
                digest = document_digest(document.text)
                if digest in seen or not document.text:
                    duplicates += bool(document.text)
                    continue
                seen.add(digest)
                sources[document.source] += 1
                split: Split = "validation" if _is_validation(digest, config.validation_fraction) else "train"
                kept.append((index, split, document.text))
            texts = [
                fim_document(text, seed=config.seed, index=index, rate=config.fim_rate) if split == "train" else text
                for index, split, text in kept
            ]
            for (index, split, text), ids in zip(kept, tokenizer.encode_batch(texts), strict=True):
                if split == "train" and table:
                    ids = split_boundaries(ids, table, seed=config.seed, index=index, rate=config.boundary_split_rate)
                writers[split].add([*tokenizer.bos_ids, *ids, tokenizer.eos_token_id], len(text.encode()))
        description: dict[str, Any] = {
            "format": _FORMAT,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "tokenizer_sha256": tokenizer.fingerprint(),
            "config": asdict(config),
            "duplicates": duplicates,
            "sources": dict(sources),
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        if description["splits"]["train"]["documents"] == 0:
            held_out = description["splits"]["validation"]["documents"]
            cause = "the sources hold no text"
            if held_out:
                cause = (
                    f"all of its {held_out} are held out, chosen by a hash of their text; give the text as several documents (a line "
                    "each in a .jsonl file), or a lower validation_fraction"
                )
            raise InputError(f"no document is left for training in {directory}: {cause}")
        write_atomic(temporary / _INDEX, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    return description


def document_digest(text: str) -> bytes:
    """16 bytes that stand for a document's text, for duplicates and for the held-out split."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is_validation(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def _batches(items: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _DOCUMENTS_AT_ONCE)):
        yield batch


class _SplitWriter:
    """Appends the documents of one split to numbered files."""

    def __init__(self, directory: Path, split: Split, dtype: str, tokens_per_shard: int) -> None:
        self._directory, self._split, self._dtype, self._limit = directory, split, dtype, tokens_per_shard
        self._shards: list[dict[str, Any]] = []
        self._text_bytes = 0
        self._file: BinaryIO | None = None
        self._offsets: list[int] = []

    def add(self, ids: list[int], text_bytes: int) -> None:
        if self._file is None:
            self._file = (self._directory / f"{self._split}-{len(self._shards):05d}.bin").open("wb")
            self._offsets = [0]
        np.array(ids, dtype=np.dtype(self._dtype).newbyteorder("<")).tofile(self._file)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes
        if self._offsets[-1] >= self._limit:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        name = Path(self._file.name).name
        offsets = f"{Path(name).stem}.offsets.npy"
        np.save(self._directory / offsets, np.array(self._offsets, dtype=np.int64))
        self._shards.append(
            {
                "file": name,
                "tokens": self._offsets[-1],
                "documents": len(self._offsets) - 1,
                "sha256": _sha256(self._directory / name),
                "offsets": offsets,
                "offsets_sha256": _sha256(self._directory / offsets),
            }
        )
        self._file = None

    def close(self) -> None:
        """Let go of the file that is open; what it holds is not finished."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> dict[str, Any]:
        """Close the last shard and describe the split for the index."""
        self._finish_shard()
        return {
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "text_bytes": self._text_bytes,
            "shards": self._shards,
        }


class TokenShards:
    """One split of a shard directory, read through memory maps as a single run of tokens.

    Opening checks every file of the split against the index: its presence, its size and, with `verify`, its SHA-256. A
    mismatch is an InputError that names the file.
    """

    def __init__(self, directory: str | Path, split: Split = "train", *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.split = split
        index = read_json(self.directory / _INDEX)
        if index.get("format") != _FORMAT or split not in index.get("splits", {}):
            raise InputError(f"{self.directory / _INDEX} is not the index of a token shard directory with a {split!r} split")
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        description = index["splits"][split]
        self.fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        """A hash over the checksums of the split's files: two splits with the same one hold the same tokens."""
        self.num_documents: int = description["documents"]
        self.text_bytes: int = description["text_bytes"]
        self._maps: list[np.ndarray] = []
        offsets = [np.zeros(1, dtype=np.int64)]
        starts = [0]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        for shard in description["shards"]:
            file, offsets_file = self.directory / shard["file"], self.directory / shard["offsets"]
            _check(file, shard["sha256"] if verify else None, shard["tokens"] * dtype.itemsize)
            _check(offsets_file, shard["offsets_sha256"] if verify else None, None)
            self._maps.append(np.memmap(file, dtype=dtype, mode="r"))
            offsets.append(np.load(offsets_file)[1:] + starts[-1])
            starts.append(starts[-1] + shard["tokens"])
        self._starts = np.array(starts, dtype=np.int64)
        self.document_offsets: np.ndarray = np.concatenate(offsets)
        """int64 [documents + 1]: where each document starts in the run of tokens."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, begin and end of sentence included."""
        return int(self._starts[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: tokens of the run, across file boundaries."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}..{stop} lie outside of 0..{self.num_tokens}")
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._starts[shard + 1]))
            base = int(self._starts[shard])
            parts.append(self._maps[shard][start - base : end - base])
            start, shard = end, shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)

    def document(self, number: int) -> np.ndarray:
        """int64 [length]: the ids of one document, begin and end of sentence included."""
        return self.tokens(int(self.document_offsets[number]), int(self.document_offsets[number + 1]))

    def rows(self, numbers: np.ndarray | list[int] | range, sequence_length: int) -> np.ndarray:
        """int64 [len(numbers), T + 1]: packed rows by number, 0 .. row_count(num_tokens, T) - 1."""
        slices = (row_slice(int(number), sequence_length) for number in numbers)
        out = [self.tokens(piece.start, piece.stop) for piece in slices]
        return np.stack(out) if out else np.zeros((0, sequence_length + 1), dtype=np.int64)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """InputError if the shards were written with another tokenizer."""
        if tokenizer.fingerprint() != self.tokenizer_sha256:
            raise InputError(f"{self.directory} was written with another tokenizer; write the shards again with this one")


def _check(file: Path, sha256: str | None, size: int | None) -> None:
    if not file.is_file():
        raise InputError(f"{file} is missing; write the shards again")
    if size is not None and file.stat().st_size != size:
        raise InputError(f"{file} has {file.stat().st_size} bytes where {size} are expected (truncated?); write the shards again")
    if sha256 is not None and _sha256(file) != sha256:
        raise InputError(f"{file} does not match its checksum; write the shards again")


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
