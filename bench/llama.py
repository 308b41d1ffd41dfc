"""llama.cpp's own benchmark of parallel sequences, on GGUF files that we write: a peer for whatever of ours decodes the same model.

`python -m bench.llama DIR --llama-bin BIN` measures llama.cpp alone. To put something of ours beside it in one run, give `measure` more
competitors: a competitor's turn gets the number of sequences and returns a Speed.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console

from bench.contest import Build, alternate, summarize
from bench.machine import describe_device, read_commit, read_load
from bench.results import Row, print_table, write_result
from finback.config import InputError

OURS = "finback"
TRIES = 10  # its log has a thread of its own, and now and then the program ends before the thread has written the result
PROMPT_ALIGNMENT = 256  # llama.cpp rounds the context of a sequence up to this


class Speed(NamedTuple):
    """What a turn took by the competitor's own clock, prompt included, and how many tokens came out, all sequences together."""

    seconds: float
    tokens: int
    step_seconds: float = math.nan
    """Of a step that reads no prompt, on average."""


@dataclass(frozen=True)
class Size:
    """How much is measured: every number of sequences, `turns` times in turns with the other competitors."""

    types: tuple[str, ...] = ("BF16", "Q8_0", "Q4_0")
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 32
    new_tokens: int = 128
    threads: int = 2
    warm_up: int = 0  # the tool warms up by itself
    turns: int = 3


def find_tool(name: str, directory: Path | None) -> Path:
    """A program of llama.cpp: in `directory` if given, else on the PATH. Raises InputError where there is none."""
    found = shutil.which(name, path=None if directory is None else str(directory))
    if found is None:
        where = "on the PATH" if directory is None else f"in {directory}"
        raise InputError(f"there is no {name} {where}; build llama.cpp, and name the directory of its programs by --llama-bin")
    return Path(found)


def prepare(source: Path, work: Path, types: tuple[str, ...], llama_bin: Path | None) -> dict[str, Path]:
    """GGUF files of a Hugging Face directory in `work`: BF16 by `finback convert`, the others from that by llama-quantize."""
    from finback.commands.convert import main as convert

    plain = work / "BF16" / "model.gguf"
    if not plain.exists():
        convert([str(source), str(plain), "--dtype", "bfloat16"])
    files = {"BF16": plain}
    for kind in types:
        files[kind] = work / kind / "model.gguf"
        if not files[kind].exists():
            files[kind].parent.mkdir(parents=True)
            _called([find_tool("llama-quantize", llama_bin), plain, files[kind], kind])
    return {kind: files[kind] for kind in types}


def build_llama(tool: Path, model: Path, size: Size) -> Callable[[int], Speed]:
    """Decodes from `batch` random prompts by llama-batched-bench, which neither samples nor detokenises. Its clock starts when the
    model is loaded and warm."""

    def turn(batch: int) -> Speed:
        context = -(-(size.prompt + size.new_tokens) // PROMPT_ALIGNMENT) * PROMPT_ALIGNMENT
        options = {"-npp": size.prompt, "-ntg": size.new_tokens, "-npl": batch, "-c": batch * context}
        options |= {"-t": size.threads, "-tb": size.threads}
        words = [str(word) for pair in options.items() for word in pair]
        for _ in range(TRIES):
            told = _called([tool, "-m", model, *words, "--output-format", "jsonl"])
            lines = [line for line in told.splitlines() if line.startswith("{")]
            if lines:
                break
        else:
            raise InputError(f"{tool.name} measured nothing on {model}; it said: {told.strip()[-300:] or 'nothing'}")
        measured = json.loads(lines[-1])
        asked, done = (size.prompt, size.new_tokens, batch), (measured["pp"], measured["tg"], measured["pl"])
        assert asked == done, f"{tool.name} measured {done} instead of {asked}"
        return Speed(measured["t"], batch * size.new_tokens, measured["t_tg"] / size.new_tokens)

    return turn


def competitors(models: Mapping[str, Path], size: Size, llama_bin: Path | None) -> dict[str, Build]:
    """llama.cpp on each file, by the name "llama.cpp TYPE"."""
    tool = find_tool("llama-batched-bench", llama_bin)
    return {f"llama.cpp {kind}": partial(build_llama, tool, model, size) for kind, model in models.items()}


def measure(rivals: Mapping[str, Build], size: Size, *, separate: bool = True) -> list[Row]:
    """A row for each number of sequences and competitor; where one is called "finback", the rows compare it with each other one."""
    schedule = [batch for _ in range(size.warm_up + size.turns) for batch in size.batches]
    turns = alternate(rivals, schedule, separate=separate)
    rows = []
    for batch in size.batches:
        speeds, best, steps = {}, {}, {}
        for name, all_turns in turns.items():
            kept = [turn.value for turn, b in zip(all_turns, schedule, strict=True) if b == batch][size.warm_up :]
            values = [speed.tokens / speed.seconds for speed in kept]
            speeds[name], best[name] = summarize(values), max(values)
            steps[name] = 1e3 * summarize([speed.step_seconds for speed in kept]).median
        for name, speed in speeds.items():
            what = f"decode, {batch} sequence{'s' if batch > 1 else ''}"
            extra = {"sequences": batch, "best_tokens_per_second": best[name], "step_milliseconds": steps[name]}
            if OURS not in speeds or len(speeds) == 1:
                rows.append(Row(f"{what}, {name}", "tokens_per_second", *speed, extra=extra))
            elif name != OURS:
                extra |= {"best_tokens_per_second": best[OURS], "peer_best_tokens_per_second": best[name]}
                extra |= {"step_milliseconds": steps[OURS], "peer_step_milliseconds": steps[name]}
                rows.append(Row(what, "tokens_per_second", *speeds[OURS], name, *speed, extra=extra))
    return rows


def notes(size: Size) -> list[str]:
    return [
        f"{size.prompt} prompt tokens, {size.new_tokens} new ones for each sequence, {size.threads} threads; tokens per second are the "
        "new tokens of all sequences by the time of the whole loop, prompt included.",
        "llama-batched-bench neither samples nor detokenises, and does not load or warm up on the clock.",
    ]


def main(
    source: Annotated[Path, tyro.conf.Positional],
    llama_bin: Path | None = None,
    size: Annotated[Size, tyro.conf.arg(name="")] = Size(),
    work: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure llama.cpp on the model of a Hugging Face directory.

    Args:
        source: Hugging Face directory of a model that `finback convert` can write as GGUF.
        llama_bin: Directory of llama.cpp's programs; the PATH if not given.
        work: Where the GGUF files are kept for the next time; a temporary directory if not given.
        out: Directory for llama.json; only printed if not given.
    """
    console = Console()
    facts = {**read_commit(), "device": describe_device(), **read_load()}
    with tempfile.TemporaryDirectory() as temporary:
        models = prepare(source, work or Path(temporary), size.types, llama_bin)
        rows = measure(competitors(models, size, llama_bin), size)
    print_table(console, f"llama.cpp on {source.resolve().name}", rows, notes(size))
    if out is not None:
        console.print(f"  written to {write_result(out, 'llama', rows, notes(size), facts, {})}\n", style="dim", soft_wrap=True)


def _called(command: list[str | Path]) -> str:
    """What a program prints; InputError with the end of its complaints if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        raise InputError(f"{command[0]} ended with code {result.returncode}: {(result.stderr or result.stdout).strip()[-300:]}")
    return result.stdout


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m bench.llama")
    except InputError as error:
        sys.exit(f"bench.llama: {error}")
