"""A run of several stages that can be interrupted anywhere.

The run directory is the state. `manifest.json` gets an entry when a stage is finished, with what it measured; a run that was
interrupted goes on with the first stage that has none. A stage that trains goes on from its newest checkpoint.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from finback.config import InputError
from finback.data.files import atomic_directory, read_json, write_atomic

MANIFEST = "manifest.json"
PACKAGES = ("finback", "torch", "numpy", "tokenizers", "safetensors")
_UNHASHED = ("checkpoints", "tensorboard", "training")  # what is written while training


class Run(NamedTuple):
    """What every stage gets, besides its own settings."""

    directory: Path
    manifest: dict[str, Any]
    console: Console

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage measured."""
        found: dict[str, Any] = self.manifest["stages"][stage]
        return found


class Stage(NamedTuple):
    """One part of a recipe: `work` returns what it measured, as JSON values."""

    name: str
    title: str
    work: Callable[[Run], dict[str, Any]]


class StageFailed(InputError):
    """A stage did not improve what it must; the run stops, and what was finished stays."""


def open_run(directory: Path, recipe: str, settings: Mapping[str, Any], *, fresh: bool) -> Run:
    """The run in `directory`, a new one if there is none; with `fresh` what is there is removed.

    Raises InputError if the directory holds something else, or the run was started with other settings.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give another --out")
    file = directory / MANIFEST
    if directory.exists() and any(directory.iterdir()):
        if not file.is_file() or read_json(file).get("recipe") != recipe:
            raise InputError(f"{directory} is not empty and holds no {recipe} run; give another --out")
        if fresh:
            shutil.rmtree(directory)
    console = Console(highlight=False)
    if file.is_file():
        manifest = read_json(file)
        for name, value in settings.items():
            before = manifest["settings"].get(name)
            if before != value:
                raise InputError(
                    f"{directory} was started with {name} {before!r}, not {value!r}; "
                    f"run it with --{name.replace('_', '-')} {before}, or with --fresh to start over"
                )
        return Run(directory, manifest, console)
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    manifest = {
        "recipe": recipe,
        "finished": False,
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), **packages},
        "stages": {},
        "files": {},
    }
    run = Run(directory, manifest, console)
    write_manifest(run)
    return run


def run_stages(run: Run, stages: Sequence[Stage], again: str) -> None:
    """Work through the stages that are not finished. `again` is the command that goes on with the run."""
    try:
        for number, stage in enumerate(stages, start=1):
            heading = f"{number}/{len(stages)}  {stage.title}"
            if stage.name in run.manifest["stages"]:
                write_heading(run.console, f"{heading}: done before")
                continue
            write_heading(run.console, heading)
            start = time.perf_counter()
            facts = stage.work(run)
            seconds = round(time.perf_counter() - start, 2)
            run.manifest["stages"][stage.name] = {"title": stage.title, "seconds": seconds, **facts}
            write_manifest(run)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from here: {again}")
        raise


def run_or_skip(run: Run, stages: Sequence[Stage], again: str) -> None:
    """Work through the stages and finish the run; one that is finished is left as it is."""
    if run.manifest["finished"]:
        print(f"{run.directory} is finished already; to run it again from the start, add --fresh.")
        return
    run_stages(run, stages, again)
    finish_run(run, stages)


def write_manifest(run: Run) -> None:
    write_atomic(run.directory / MANIFEST, json.dumps(run.manifest, indent=2, ensure_ascii=False) + "\n")


def finish_run(run: Run, stages: Sequence[Stage]) -> None:
    """Checksums of the files into the manifest, and the times of the stages onto the terminal."""
    files = (path for path in sorted(run.directory.rglob("*")) if path.is_file() and path.name != MANIFEST)
    relative = [path.relative_to(run.directory) for path in files]
    run.manifest["files"] = {str(path): file_hash(run.directory / path) for path in relative if path.parts[0] not in _UNHASHED}
    run.manifest["finished"] = True
    write_manifest(run)
    write_heading(run.console, "Done")
    total = 0.0
    for stage in stages:
        seconds = run.facts(stage.name)["seconds"]
        total += seconds
        print(f"{stage.title:<28} {seconds:7.1f} s")
    print(f"{'In all':<28} {total:7.1f} s")


def stage_times(run: Run) -> str:
    """A Markdown table of the stages that are finished: seconds, tokens that each read or, by reinforcement learning, sampled, and the
    share of the MTP module's drafts that the model behind it agrees with."""
    rows = (
        f"| {facts['title']} | {facts['seconds']:.1f} | {_told(facts, 'tokens', ',')} | {_told(facts, 'mtp_acceptance', '.1%')} |"
        for facts in run.manifest["stages"].values()
    )
    return "| stage | seconds | tokens | drafts accepted |\n|---|---:|---:|---:|\n" + "\n".join(rows)


def _told(facts: Mapping[str, Any], name: str, form: str) -> str:
    return format(facts[name], form) if name in facts else ""


def write_heading(console: Console, words: str) -> None:
    console.print()
    console.rule(f"[bold]{words}", align="left", style="dim")


def copy_model(source: Path, target: Path) -> None:
    """The same model under another name; no bytes are copied where the file system has hard links."""
    with atomic_directory(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, destination: str) -> None:
    try:
        # Of a symbolic link, of which caches of hubs are full, the file that it names.
        os.link(os.path.realpath(source), destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
