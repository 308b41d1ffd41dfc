"""llama.cpp beside us: its server on a socket of its own, for tests that compare with it and are skipped where it is not installed."""

import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.model.generate import generate
from finback.model.transformer import Transformer

TIE = 1e-4  # between two logits; sums in another order move them by less
needs_llama_cpp = pytest.mark.skipif(shutil.which("llama-server") is None, reason="llama.cpp's llama-server is not on the PATH")


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket: no port."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class LlamaServer:
    """A running llama-server: one slot, float32 caches, greedy."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def post(self, route: str, body: dict[str, Any]) -> Any:
        connection = _Connection(self._path)
        try:
            connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        assert response.status == 200, answer
        return answer

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy token ids after `prompt`, which it gets as ids."""
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        tokens: list[int] = self.post("/completion", body)["tokens"]
        return tokens

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens written in it included, as we do."""
        tokens: list[int] = self.post("/tokenize", {"content": text, "parse_special": True})["tokens"]
        return tokens


@contextmanager
def llama_server(model: Path, socket_directory: Path, log: list[str] | None = None) -> Iterator[LlamaServer]:
    """Serve a GGUF file; `socket_directory` must have a short path, which is a limit of sockets. What it says goes to `log`."""
    path, log = socket_directory / "llama.sock", [] if log is None else log
    executable = shutil.which("llama-server")
    assert executable is not None
    options = ["--threads", "1", "--parallel", "1", "--no-warmup", "--flash-attn", "off", "--ctx-size", "0", "--no-webui"]
    options += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--host", str(path)]
    command = [executable, "--model", str(model), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        drain = threading.Thread(target=process.stdout.read)  # a full pipe would stop it
        try:
            for line in process.stdout:
                log.append(line)
                if "listening on" in line:
                    break
            else:
                raise AssertionError("llama-server ended: " + "".join(log[-20:]))
            drain.start()
            yield LlamaServer(path)
        finally:
            process.kill()
            if drain.ident is not None:
                drain.join()


def check_same_tokens(model: Transformer, server: LlamaServer, prompts: Sequence[Sequence[int]], count: int) -> int:
    """Both sides continue every prompt by the same `count` tokens, or part at a tie of two logits: returns how many did."""
    ties = 0
    for prompt in prompts:
        ours = generate(model, torch.tensor([prompt]), count)[0, len(prompt) :].tolist()
        theirs = server.generate(prompt, count)
        if ours == theirs:
            continue
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        assert at is not None, f"llama.cpp stopped after {len(theirs)} of {count} tokens"
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ours[:at]]]))[0, -1]
        margin = float(logits[ours[at]] - logits[theirs[at]])
        assert abs(margin) < TIE, f"token {at} after {prompt}: {ours[at]} and {theirs[at]}, {margin:.1e} apart in our logits"
        ties += 1
    return ties
