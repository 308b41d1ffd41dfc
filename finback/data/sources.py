"""Where documents come from: generators of `Document`, one file or corpus at a time."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.config import InputError


@dataclass(frozen=True)
class Document:
    """One text and the name of where it came from."""

    text: str
    source: str


def text_documents(file: str | Path) -> Iterator[Document]:
    """A UTF-8 text file as one document."""
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None
    yield Document(text, file.name)


def jsonl_documents(file: str | Path, field: str = "text") -> Iterator[Document]:
    """One document per line of a JSON-lines file, from `field`. InputError names the file and line that is wrong."""
    file = Path(file)
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield Document(_jsonl_field(line, field, f"{file}, line {number}"), file.name)


def _jsonl_field(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error})") from None
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise InputError(f"{where} has no text in field {field!r}; name the field that holds it")
    return _checked(value, where)


def _checked(text: str, where: str) -> str:
    # A lone surrogate (half of an escaped pair) cannot be written as UTF-8.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half of a surrogate pair (character {error.start}); remove it") from None
    return text


def parquet_documents(file: str | Path, column: str = "text") -> Iterator[Document]:
    """One document per row of a Parquet file, from `column`, read in batches. Needs the extra `data` (pyarrow)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading Parquet needs pyarrow; install finback[data]") from None
    file = Path(file)
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file} is not a Parquet file: {error}") from None
    with table:
        if column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise InputError(f"{file} has no column {column!r}; it has {names}")
        row = 0
        for batch in parquet_batches(table, file, columns=[column]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise InputError(f"{file}, row {row}: column {column!r} holds {type(value).__name__}, not text")
                yield Document(value, file.name)
                row += 1


def parquet_batches(table: Any, file: Path, columns: list[str] | None = None) -> Iterator[Any]:
    """Batches of rows of an open Parquet file; InputError, naming the file, where its pages are damaged."""
    import pyarrow

    try:
        yield from table.iter_batches(batch_size=1024, columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} is damaged: {error}; get it again") from None


def stdlib_documents() -> Iterator[Document]:
    """The source files of Python's own standard library on this machine (PSF licence), tests left out, sorted by
    path."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if skipped.isdisjoint(relative.parts):
            try:
                yield Document(file.read_text(encoding="utf-8"), "python-stdlib")
            except UnicodeDecodeError:
                continue  # a few files are kept in old encodings on purpose


def documents_from(path: str | Path, *, field: str = "text") -> Iterator[Document]:
    """Documents of a .txt, .jsonl or .parquet file, or of all such files under a directory, sorted by path."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl", ".parquet") and file.is_file())
        if not files:
            raise InputError(f"{path} holds no .txt, .jsonl or .parquet file")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path} does not exist")
    for file in files:
        if file.suffix == ".txt":
            yield from text_documents(file)
        elif file.suffix == ".jsonl":
            yield from jsonl_documents(file, field)
        elif file.suffix == ".parquet":
            yield from parquet_documents(file, field)
        else:
            raise InputError(f"{file} has suffix {file.suffix!r}; give .txt, .jsonl or .parquet")
