"""Data sets of the Hugging Face hub, from a hub of our own on this machine."""

import errno
import hashlib
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from finback.data.hub import hub_documents  # noqa: E402

COMMIT = "0123456789012345678901234567890123456789"
FILES = {"data/train-1.parquet": ["b"], "data/train-0.parquet": ["a", "字"], "data/test-0.parquet": ["t"]}


def _parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), buffer)
    return buffer.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
    """The two routes that getting a file needs."""

    contents = {name: _parquet(texts) for name, texts in FILES.items()}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/some/fables"):
            siblings = [{"rfilename": name} for name in (*self.contents, "README.md")]
            self._send(json.dumps({"id": "some/fables", "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
            return
        name = path.rpartition(f"/resolve/{COMMIT}/")[2] if COMMIT in path else path.partition("/resolve/main/")[2]
        if path.startswith("/datasets/some/fables/") and name in self.contents:
            content = self.contents[name]
            etag = hashlib.sha256(content).hexdigest()
            self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What makes the library ask our hub: it reads the address when it is imported, hence the processes below."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        server.shutdown()
        thread.join()


def _fetch(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finback", "fetch", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_a_data_set_becomes_text(environment: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = _fetch(environment, "some/fables", "--subset", "train", "--cache", str(cache))
    assert done.returncode == 0, done.stderr
    lines = (cache / "hub" / "some--fables" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a", "字", "b"]  # in the order of the files' names


def test_what_is_not_there_is_one_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    for words, expected in (
        (["some/nothing"], "could not get the data set some/nothing from the Hugging Face hub"),
        (["some/fables", "--subset", "valid"], "has no Parquet file with 'valid' in its path"),
        (["some/fables", "--column", "body"], "has no column 'body'; it has text"),
    ):
        done = _fetch(environment, *words, "--cache", cache)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = _fetch(environment, "some/fables", "--cache", cache)
    assert done.returncode == 2
    assert "set HF_ENDPOINT to a mirror that can be reached" in done.stderr
    assert not list(Path(cache).rglob("text.jsonl"))


def test_a_full_disk_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*words: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", full)
    with pytest.raises(OSError, match="No space left"):
        next(hub_documents("some/fables"))
