"""`finback serve` beside llama-server, and beside the bare engine: tokens per second and time to the first token, by requests at once.

Both servers get the same requests by OpenAI's /v1/completions, streamed, from clients in this process.
"""

import asyncio
import contextlib
import math
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.contest import in_a_fresh_process, summarize
from bench.llama import OURS, find_tool, prepare
from bench.machine import ROOT
from bench.results import Row
from finback.config import InputError
from finback.data.fetch import default_cache

PEER = "llama-server"
START_SECONDS = 120.0
TEXT = "the whale swims north in a cold deep sea where small fish follow its song and ice drifts by"
TARGET_OVERHEAD = 0.05  # of the engine's time, at the most clients


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: Path = field(default_factory=lambda: default_cache() / "smollm2")
    llama_bin: Path | None = None  # None: the PATH
    small: Path = ROOT / "runs" / "quickstart" / "final"
    """A model whose steps are so short that serving is most of the work: what serving takes of them is told."""
    clients: tuple[int, ...] = (1, 8, 32)
    requests: int = 2  # of each client in a turn
    prompt_words: int = 32
    new_tokens: int = 128
    turns: int = 3
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    dtype: str = "bfloat16"


FULL: Size = Size()
QUICK: Size = Size(clients=(1, 8), requests=1, new_tokens=24, turns=1)


class Load(NamedTuple):
    """One turn of requests against a server."""

    tokens_per_second: float
    first: list[float]
    """Seconds to the first token of each request."""
    loop_seconds: float | None = None
    """Processor time of the server's event loop for each token; None where nothing tells."""


def run(size: Size) -> tuple[list[Row], list[str]]:
    """Rows of what is there. A note says how to get the rest."""
    if not (size.model / "config.json").is_file():
        return [], ["Without SmolLM2-135M: finback fetch smollm2 gets it."]
    notes = [
        f"{size.requests} streamed requests of each client at /v1/completions, {size.prompt_words} words of prompt, {size.new_tokens} "
        f"new tokens, greedy, {size.threads} threads; the clients run on the same cores.",
    ]
    with contextlib.ExitStack() as stack:
        url, process = stack.enter_context(our_server(size))
        servers = {OURS: url}
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finback-bench-")))
        try:
            tool = find_tool(PEER, size.llama_bin)
            find_tool("llama-quantize", size.llama_bin)
        except InputError as error:
            notes.append(f"Without llama.cpp ({error}).")
        else:
            file = prepare(size.model, work, ("BF16",), tool.parent)["BF16"]
            servers[PEER] = stack.enter_context(llama_server(tool, file, size))
        turns = _in_turns(servers, size, process)
    rows = [row for clients in size.clients for row in _rows(clients, turns)]
    most = max(size.clients)
    rows += _overhead(size, turns[OURS, most], "")
    if (size.small / "config.json").is_file():
        small = replace(size, model=size.small, clients=(most,), dtype="auto")
        with our_server(small) as (url, process):
            turns = _in_turns({OURS: url}, small, process)
        rows += _overhead(small, turns[OURS, most], ", the quickstart's model")
    else:
        notes.append("Without the quickstart's model: `make quickstart` trains it, `--model DIR` names another.")
    notes.append(
        "The API's own time: processor time of the server's event loop for each token, by the engine's time for each token. "
        "Slower than the engine alone: LLM.generate on the same prompts; the clients' work and waiting for a core count here, too."
    )
    if not any(load.loop_seconds for load in turns[OURS, most]):
        notes.append("The API's own time is not told: this system does not say what processor time a thread has had.")
    return rows, notes


def _overhead(size: Size, loads: list[Load], which: str) -> list[Row]:
    """What serving takes beside the bare engine, at the most clients."""
    most = max(size.clients)
    bare = in_a_fresh_process(partial(build_engine, size), most)
    served = statistics.median(load.tokens_per_second for load in loads)
    facts = {"clients": most, "engine_tokens_per_second": bare, "api_tokens_per_second": served}
    rows = []
    spent = [load.loop_seconds for load in loads if load.loop_seconds is not None]
    if any(spent):
        each = statistics.median(spent)
        told = facts | {"microseconds_per_token": 1e6 * each}
        told |= {} if which else {"wanted_at_most": TARGET_OVERHEAD}
        rows.append(Row(f"the API's own time beside the engine's{which}, {_clients(most)}", "share", each * bare, extra=told))
    slower = max(bare / served - 1, 1e-6)
    rows.append(Row(f"slower than the engine alone{which}, {_clients(most)} on the same cores", "share", slower, extra=facts))
    return rows


def _in_turns(servers: dict[str, str], size: Size, process: int) -> dict[tuple[str, int], list[Load]]:
    """Every number of clients against every server, `turns` times in turns; each after a short warm-up."""
    for url in servers.values():
        asyncio.run(ask(url, size, max(size.clients), 0, new_tokens=2, requests=1))
    turns: dict[tuple[str, int], list[Load]] = {}
    for turn in range(size.turns):
        for clients in size.clients:
            for name, url in servers.items():
                before = loop_seconds(process)
                load = asyncio.run(ask(url, size, clients, 1 + turn, new_tokens=size.new_tokens, requests=size.requests))
                after = loop_seconds(process)
                if name == OURS and before is not None and after is not None:
                    load = load._replace(loop_seconds=(after - before) / (clients * size.requests * size.new_tokens))
                turns.setdefault((name, clients), []).append(load)
    return turns


def loop_seconds(process: int) -> float | None:
    """Processor time of a process' first thread, which of our server is the event loop; None where the system does not tell.

    Linux tells it in nanoseconds (schedstat), up to when the thread last slept. In ticks of 10 ms a short run would be nothing."""
    schedstat = Path(f"/proc/{process}/task/{process}/schedstat")
    return int(schedstat.read_text().split()[0]) / 1e9 if schedstat.exists() else None


def _rows(clients: int, turns: dict[tuple[str, int], list[Load]]) -> list[Row]:
    peer = (PEER, clients) in turns

    def values(name: str, of: Callable[[Load], float]) -> tuple[float, float | None]:
        return summarize([of(load) for load in turns[name, clients]])

    rows = []
    for what, unit, of in (
        ("served", "tokens_per_second", lambda load: load.tokens_per_second),
        ("first token p50", "milliseconds", lambda load: 1000 * percentile(load.first, 50)),
        ("first token p99", "milliseconds", lambda load: 1000 * percentile(load.first, 99)),
    ):
        row = Row(f"{what}, {_clients(clients)}", unit, *values(OURS, of), extra={"clients": clients})
        if peer:
            theirs, spread = values(PEER, of)
            row = replace(row, peer=PEER, peer_value=theirs, peer_spread_percent=spread)
        rows.append(row)
    return rows


def _clients(number: int) -> str:
    return f"{number} client{'s' if number > 1 else ''}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def prompts(size: Size, clients: int, seed: int, requests: int) -> list[list[str]]:
    """Of each client; all different, so that no prefix is found."""
    chance = random.Random(seed * 1000 + clients)
    return [[" ".join(chance.choices(TEXT.split(), k=size.prompt_words)) for _ in range(requests)] for _ in range(clients)]


async def ask(url: str, size: Size, clients: int, seed: int, *, new_tokens: int, requests: int) -> Load:
    """So many clients at once, each asking one thing after the other. They read what comes and look for two words in it: they run on
    the servers' cores, and a client library would take more of them than the servers do."""
    import orjson

    host, _, port = url.removeprefix("http://").rpartition(":")
    first: list[float] = []
    total = 0

    async def client(texts: list[str]) -> None:
        nonlocal total
        for text in texts:
            body = orjson.dumps({
                "model": "model", "prompt": text, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True},
            })  # fmt: skip
            start, seen, parts = time.perf_counter(), None, list[bytes]()
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            while part := await reader.read(1 << 16):
                if seen is None and b"data: {" in part:
                    seen = time.perf_counter()
                parts.append(part)
            writer.close()
            answer = b"".join(parts)
            found = re.search(rb'"completion_tokens": ?(\d+)', answer)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
            assert seen is not None
            assert found is not None, answer[-300:]
            assert int(found[1]) == new_tokens, f"{int(found[1])} tokens came instead of {new_tokens}"
            first.append(seen - start)
            total += new_tokens

    start = time.perf_counter()
    await asyncio.gather(*(client(texts) for texts in prompts(size, clients, seed, requests)))
    return Load(total / (time.perf_counter() - start), first)


def build_engine(size: Size) -> Callable[[int], float]:
    """The bare engine on the prompts of the first turn; its tokens per second."""
    import torch

    from finback import LLM, SamplingParams

    torch.set_num_threads(size.threads)
    llm = LLM(size.model, dtype="auto" if size.dtype == "auto" else getattr(torch, size.dtype), max_num_seqs=max(size.clients))
    params = SamplingParams(temperature=0.0, max_tokens=size.new_tokens, ignore_eos=True)

    def turn(clients: int) -> float:
        llm.generate([texts[0] for texts in prompts(size, clients, 0, 1)], SamplingParams(max_tokens=2))
        speeds = []
        for number in range(size.turns):
            start = time.perf_counter()
            for round_ in zip(*prompts(size, clients, 1 + number, size.requests), strict=True):
                llm.generate(list(round_), params)
            speeds.append(clients * size.requests * size.new_tokens / (time.perf_counter() - start))
        return statistics.median(speeds)

    return turn


@contextlib.contextmanager
def our_server(size: Size) -> Iterator[tuple[str, int]]:
    """`finback serve` in a process of its own; its address and its number."""
    command = [sys.executable, "-m", "finback", "serve", str(size.model), "--port", "0", "--name", "model", "--dtype", size.dtype]
    command += ["--max-num-seqs", str(max(size.clients))]
    environment = os.environ | {"OMP_NUM_THREADS": str(size.threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise InputError(f"finback serve {size.model} did not start; its own message stands above")
        yield found[0], process.pid
    finally:
        _end(process)


@contextlib.contextmanager
def llama_server(tool: Path, model: Path, size: Size) -> Iterator[str]:
    """llama-server with a slot for each client; its address."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots, context = max(size.clients), 256 * -(-(2 * size.prompt_words + size.new_tokens) // 256)
    command = [
        str(tool),
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-np",
        str(slots),
        "-c",
        str(slots * context),
    ]
    command += ["-t", str(size.threads), "-tb", str(size.threads)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                time.sleep(0.1)
            else:
                log.seek(0)
                raise InputError(f"{tool} did not start; it said: {log.read().decode(errors='replace').strip()[-300:]}")
            yield url
        finally:
            _end(process)


def _end(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("serve")
