"""Rows of results: one shape for every benchmark, as JSON on the disk and as a table on the screen."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HIGHER_IS_BETTER = ("_per_second", "share", "gb_per_second")
_SYMBOLS = {
    "tokens_per_second": "tok/s",
    "gflop_per_second": "GFLOP/s",
    "gb_per_second": "GB/s",
    "milliseconds": "ms",
    "seconds": "s",
    "mebibytes": "MiB",
    "gflop": "GFLOP",
    "megabytes": "MB",
    "share": "",
}


@dataclass(frozen=True)
class Row:
    """One measured number. `unit` is the name of its field in the JSON; a peer's number has the same unit.

    `ratio` says how many times better than the peer we are, whichever direction better is. A target concerns the ratio if there is a
    peer, else the value. `floor` holds what the work costs at least: its keys carry their units.
    """

    name: str
    unit: str
    value: float
    spread_percent: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    peer_spread_percent: float | None = None
    target: float | None = None
    floor: Mapping[str, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        if self.peer_value is None:
            return None
        return self.value / self.peer_value if higher_is_better(self.unit) else self.peer_value / self.value

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        return (self.value if self.ratio is None else self.ratio) >= self.target

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            self.unit: self.value,
            "spread_percent": self.spread_percent,
            "peer": self.peer,
            f"peer_{self.unit}": self.peer_value,
            "peer_spread_percent": self.peer_spread_percent,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met,
            "floor": None if self.floor is None else dict(self.floor),
            **self.extra,
        }


def higher_is_better(unit: str) -> bool:
    return unit.endswith(HIGHER_IS_BETTER)


def write_result(
    directory: Path, bench: str, rows: list[Row], notes: list[str], facts: Mapping[str, Any], tables: Mapping[str, Any]
) -> Path:
    """`directory`/`bench`.json, whole or not at all. `facts` are those of the run: device, commit, load."""
    content = {
        "bench": bench,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "notes": notes,
        "rows": [row.to_dict() for row in rows],
        **tables,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{bench}.json"
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Write beside the target, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def cells(row: Mapping[str, Any]) -> list[str]:
    """name, ours, peer, ratio, target, floor: a row of the JSON as text."""
    unit = unit_of(row)
    target = "" if row["target"] is None else f"{row['target']:g}{'x' if row['peer'] else ''} {'met' if row['met'] else 'MISSED'}"
    peer = "" if row["peer"] is None else f"{with_unit(row[f'peer_{unit}'], unit)} ({row['peer']})"
    floor = "; ".join(with_unit(value, name) for name, value in (row["floor"] or {}).items())
    spread = "" if row["spread_percent"] is None else f" ±{row['spread_percent'] / 2:.0f}%"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    return [row["name"], with_unit(row[unit], unit) + spread, peer, ratio, target, floor]


HEADINGS = ("", "finback", "peer", "ratio", "target", "floor")
ALONE = ("", "measured", "peer", "ratio", "target", "floor")  # where nobody is compared


def unit_of(row: Mapping[str, Any]) -> str:
    """The name of the value's field: the one that follows `name`."""
    return list(row)[1]


def with_unit(value: float, name: str) -> str:
    """3.21 GB/s from (3.21, "read_gb_per_second"): the unit is the end of the name, what stands before says what it is."""
    unit = next((known for known in _SYMBOLS if name == known or name.endswith(f"_{known}")), None)
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if unit is None:
        return f"{digits} {name.replace('_', ' ')}"
    what = name.removesuffix(unit).strip("_").replace("_", " ")
    return " ".join(part for part in (what, digits, _SYMBOLS[unit]) if part)


def print_table(console: Console, title: str, rows: list[Row], notes: list[str]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in HEADINGS if any(row.peer for row in rows) else ALONE:
        table.add_column(heading, justify="left" if heading in ("", "peer", "floor") else "right")
    for row in rows:
        style = {True: "green", False: "yellow", None: ""}[row.met]
        table.add_row(*cells(row.to_dict()), style=style)
    console.print(table)
    for note in notes:
        console.print(f"  {note}", style="dim")
    console.print()
