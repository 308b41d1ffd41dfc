"""A scripted peer for the chat page: it serves the page's files and answers as the last question's first word says."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parents[2] / "finback" / "server" / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".woff2": "font/woff2"}
INFO = {
    "model": "tiny",
    "context": 4096,
    "models": ["tiny", "deepseek-chat", "deepseek-reasoner"],
    "keys_required": False,
    "prices": {"hit": 1.0, "miss": 4.0, "output": 16.0},
    "version": "0.0-test",
}
USAGE = {
    "prompt_tokens": 100,
    "prompt_cache_hit_tokens": 64,
    "prompt_cache_miss_tokens": 36,
    "completion_tokens": 30,
    "completion_tokens_details": {"reasoning_tokens": 12},
}
ERRORS = {
    "midway": {"message": "engine trouble", "type": "server_error"},
    "closing": {"message": "the server is stopping", "type": "overloaded_error"},
}


@dataclass
class Script:
    """What the peer says, by a question's first word: a list of deltas (reasoning, content), sent one by one."""

    answers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    other_paths: list[str] = field(default_factory=list)
    off_peak: dict[str, Any] | None = None


def handler_for(script: Script) -> type[BaseHTTPRequestHandler]:
    """The request handler that plays `script`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a closed connection ends a body: no lengths, no chunks

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == "/finback/info":
                return self.reply(200, json.dumps(INFO | {"off_peak": script.off_peak}).encode(), "application/json")
            if path == "/user/balance":
                balance = {"is_available": True, "balance_infos": [{"currency": "CNY", "total_balance": "9.50"}]}
                return self.reply(200, json.dumps(balance).encode(), "application/json")
            file = STATIC / ("index.html" if path == "/" else path.removeprefix("/static/"))
            if path == "/" or (path.startswith("/static/") and file.is_file()):
                return self.reply(200, file.read_bytes(), TYPES.get(file.suffix, "application/octet-stream"))
            script.other_paths.append(self.path)
            return self.reply(404, b"{}", "application/json")

        def reply(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8" if "font" not in kind else kind)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.requests.append(request)
            script.keys.append(self.headers.get("Authorization", ""))
            word = request["messages"][-1]["content"].split()[0]
            if word == "refuse":
                return self.reply(401, b'{"error": {"message": "no such key"}}', "application/json")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.deltas = 0
            self.tells_usage = request["stream_options"].get("continuous_usage_stats", False)
            try:
                self.stream(word)
            except (BrokenPipeError, ConnectionResetError):
                script.hung_up.set()

        def stream(self, word: str) -> None:
            self.wfile.write(b": keep-alive\n\n")
            if word == "endless":
                self.data({"reasoning_content": "For ever. "})
                while True:
                    self.data({"content": "and on "})
                    time.sleep(0.02)
            for reasoning, content in script.answers[word]:
                self.data({"reasoning_content": reasoning, "content": content})
            if word in ("cut", "pondering"):
                return
            if word in ERRORS:
                self.wfile.write(f"data: {json.dumps({'error': ERRORS[word]})}\n\n".encode())
                return
            self.wfile.write(b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\r\n\r\n')
            self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\ndata: [DONE]\n\n".encode())

        def data(self, delta: dict[str, str]) -> None:
            self.deltas += 1  # each is a token
            chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            if self.tells_usage:
                chunk["usage"] = USAGE | {"completion_tokens": self.deltas, "completion_tokens_details": {"reasoning_tokens": 1}}
            text = json.dumps(chunk, ensure_ascii=False)
            body = f"data: {text}\n\n".encode()
            middle = len(body) // 2  # cut anywhere, inside a letter too
            self.wfile.write(body[:middle])
            self.wfile.flush()
            self.wfile.write(body[middle:])
            self.wfile.flush()

    return Handler


@contextmanager
def serving(script: Script, port: int = 0) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """The peer's address and server; it is closed at the end if it is not by then."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler_for(script))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
