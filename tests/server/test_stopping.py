"""How `finback serve` ends: by Ctrl-C or SIGTERM, with a line and exit code 0, and with what was answered until then paid for."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from finback.server.keys import NANO, KeyStore
from tests.server.serving import write_model

QUESTION = {"model": "model", "messages": [{"role": "user", "content": "Where does the whale swim?"}]}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_server_says_so_and_charges_what_it_cut_off(tmp_path: Path, number: signal.Signals) -> None:
    keys = tmp_path / "keys.sqlite"
    store = KeyStore(keys, create=True)
    secret = store.add("ann", NANO)
    model = write_model(tmp_path / "model")
    command = [sys.executable, "-m", "finback", "serve", str(model), "--port", "0", "--keys", str(keys), "--grace-seconds", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert url is not None
        # Far from its end when the signal comes.
        body = QUESTION | {"stream": True, "max_tokens": 900, "ignore_eos": True, "n": 16}
        headers = {"authorization": f"Bearer {secret}"}
        with httpx.stream("POST", f"{url[0]}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            *_, last = (line for line in lines if line)
            assert "the server is stopping" in last
    finally:
        if process.poll() is None and sys.exc_info()[0] is not None:
            process.kill()
        said, log = process.communicate(timeout=60)
    *notices, last = log.splitlines()
    assert (process.returncode, said, last) == (0, "", "model is served no more"), log
    assert all(" INFO " in line for line in notices), log
    requests, tokens, cost = store.usage(store.named("ann").id)
    assert requests == 1
    assert tokens > 16
    assert store.named("ann").balance == NANO - cost < NANO
    store.close()
