"""`python -m bench [names...] [--quick] [--out DIR]`, and the same for each benchmark alone: `python -m bench.train`."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from bench import cache, ceilings, checkpoint, decode, engine, grpo, kernels, quant, serve, small, tiny, train
from bench.machine import ROOT, describe_device, read_commit, read_load
from bench.peers import peer_versions
from bench.results import Row, print_table, write_result

Name = Literal["ceilings", "kernels", "train", "tiny", "decode", "cache", "engine", "quant", "serve", "checkpoint", "grpo"]
NAMES: tuple[Name, ...] = (
    *("ceilings", "kernels", "train", "tiny", "decode", "cache"),
    *("engine", "quant", "serve", "checkpoint", "grpo"),
)
TITLES = {
    "ceilings": "Ceilings of this machine",
    "kernels": "Products of a training step beside torch",
    "train": "Training beside transformers",
    "tiny": "Training the preset tiny",
    "decode": "Generation beside transformers",
    "cache": "The compressed cache beside the plain one",
    "engine": "The engine beside llama.cpp and transformers",
    "quant": "Packed weights beside llama.cpp's Q4_0",
    "serve": "The service beside llama-server and the bare engine",
    "checkpoint": "Checkpoints beside safetensors",
    "grpo": "A GRPO step beside TRL",
}
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "ceilings": ceilings.FULL,
        "small": small.FULL,  # the rest of the ceilings, which no other benchmark divides by
        "kernels": kernels.FULL,
        "train": train.FULL,
        "tiny": tiny.FULL,
        "decode": decode.FULL,
        "cache": cache.FULL,
        "engine": engine.FULL,
        "quant": quant.FULL,
        "serve": serve.FULL,
        "checkpoint": checkpoint.FULL,
        "grpo": grpo.FULL,
    },
    "quick": {
        "ceilings": ceilings.QUICK,
        "small": small.QUICK,
        "kernels": kernels.QUICK,
        "train": train.QUICK,
        "tiny": tiny.QUICK,
        "decode": decode.QUICK,
        "cache": cache.QUICK,
        "engine": engine.QUICK,
        "quant": quant.QUICK,
        "serve": serve.QUICK,
        "checkpoint": checkpoint.QUICK,
        "grpo": grpo.QUICK,
    },
}


def main(
    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = (),
    quick: bool = False,
    out: Path = ROOT / "bench" / "results",
    llama_bin: Path | None = None,
    mtp_directory: Path | None = None,
    model: Path | None = None,
) -> None:
    """Measure speed beside named peers, print tables, and write one JSON file per benchmark.

    Args:
        names: Which benchmarks; none given: all.
        quick: Fewer repetitions: enough to see that it works, too few for a claim.
        out: Directory of the JSON files.
        llama_bin: Directory of llama.cpp's programs, for `engine`, `quant` and `serve`; the PATH if not given.
        mtp_directory: A trained model with an MTP module, for `engine`; runs/quickstart/base if not given.
        model: A trained model, for `cache` and `serve`; runs/quickstart/final if not given.
    """
    sizes = dict(SIZES["quick" if quick else "full"])
    if llama_bin is not None:
        sizes |= {name: replace(sizes[name], llama_bin=llama_bin) for name in ("engine", "quant", "serve")}
    if mtp_directory is not None:
        sizes["engine"] = replace(sizes["engine"], mtp=replace(sizes["engine"].mtp, directory=mtp_directory))
    if model is not None:
        first, *others = sizes["cache"].readings
        sizes["cache"] = replace(sizes["cache"], readings=(replace(first, directory=model), *others))
        sizes["serve"] = replace(sizes["serve"], small=model)
    run(names or NAMES, sizes, out, quick=quick)


def main_of(name: Name) -> None:
    """`main` for one benchmark, with the options of the command line."""
    tyro.cli(main, prog=f"python -m bench.{name}", args=[name, *sys.argv[1:]])


def run(names: tuple[Name, ...], sizes: dict[str, Any], out: Path, *, quick: bool) -> None:
    """Every benchmark of `names`, with the ceilings measured first: the others divide by them."""
    console = Console()
    if not console.is_terminal:
        console.width = 150  # of a log
    facts = {**read_commit(), "quick": quick, "device": describe_device(), "peers": peer_versions(), **read_load()}
    if facts["busy"]:
        load = facts["load_average_1_minute_before"]
        console.print(
            f"The machine is busy (load average {load}): these numbers are no claims, and the JSON says so.\n", style="yellow"
        )
    ceiling_rows, measured = ceilings.run(sizes["ceilings"])
    for name in NAMES:
        if name not in names:
            continue
        start = time.perf_counter()
        rows: list[Row]
        tables: dict[str, Any] = {}
        match name:
            case "ceilings":
                rows, notes = ceiling_rows + small.run(sizes["small"]), ceilings.notes() + small.notes()
            case "kernels":
                rows, notes = kernels.run(sizes[name], measured)
            case "train":
                rows, notes = train.run(sizes[name], measured)
            case "tiny":
                rows, notes, tables = tiny.run(sizes[name], measured)
            case "decode":
                rows, notes = decode.run(sizes[name], measured)
            case "cache":
                rows, notes = cache.run(sizes[name])
            case "engine":
                rows, notes = engine.run(sizes[name], measured)
            case "quant":
                rows, notes = quant.run(sizes[name], measured)
            case "serve":
                rows, notes = serve.run(sizes[name])
            case "checkpoint":
                rows, notes = checkpoint.run(sizes[name])
            case "grpo":
                rows, notes = grpo.run(sizes[name])
        print_table(console, TITLES[name], rows, notes)
        if tables:
            for title, table in tables.items():
                print_parts(console, title, table)
        seconds = {"bench_seconds": round(time.perf_counter() - start, 1)}
        path = write_result(out, name, rows, notes, {**facts, **seconds}, tables)
        console.print(f"  written to {path}\n", style="dim", soft_wrap=True)


def print_parts(console: Console, title: str, table: list[dict[str, Any]]) -> None:
    """A table of shares, such as where a step's time goes."""
    console.print(f"  {title.replace('_', ' ')}:")
    for part in table:
        console.print(f"    {part['share']:6.1%}  {part['milliseconds']:8.1f} ms  {part['category']}")
    console.print()
