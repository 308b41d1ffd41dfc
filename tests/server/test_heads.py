"""Heads of requests: how large they may be, and which host they may name."""

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.serving import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        assert running.is_idle()


def exchange(served: Served, *pieces: bytes) -> bytes:
    """Send what stands there, as far as the server takes it; what it says until it closes the connection."""
    address = urlsplit(served.url)
    said = b""
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except OSError:
            pass  # the server has closed it in the middle
        try:
            while part := connection.recv(1 << 16):
                said += part
        except ConnectionError:
            pass
    return said


def connection_ends(served: Served, start: bytes) -> bool:
    """Whether the server closes the connection before 32 MB have followed on `start`."""
    address = urlsplit(served.url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        try:
            for piece in [start, *[b"x" * 16_384] * 2000]:
                connection.sendall(piece)
        except ConnectionError:
            return True
    return False


def head(*lines: str, target: str = "/health") -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: localhost", "Connection: close", *lines, "", ""]).encode()


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


def refused(said: bytes) -> bool:
    top, _, body = said.partition(b"\r\n\r\n")
    assert status(top) == 431
    assert b"connection: close" in top
    error = json.loads(body)["error"]
    return error["type"] == "invalid_request_error" and "larger than 65536 bytes" in error["message"]


def test_a_head_of_more_than_64_kib_is_refused(served: Served) -> None:
    assert status(exchange(served, head("A: " + "x" * 60_000))) == 200
    for large in (
        head("A: " + "x" * 70_000),
        head(*(f"A{number}: {'x' * 100}" for number in range(700))),
        head(target="/health?" + "x" * 70_000),
    ):
        assert refused(exchange(served, large))
    assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize("start", [b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: ", b"GET /health?"])
def test_a_head_that_never_ends_is_refused_while_it_arrives(served: Served, start: bytes) -> None:
    assert connection_ends(served, start)
    assert refused(exchange(served, start, b"x" * 16_384, b"x" * (65_537 - 16_384 - len(start))))


def test_what_stands_behind_a_body_is_bounded_too(served: Served) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: "
    assert connection_ends(served, start)


def test_a_long_body_in_any_pieces_is_no_head(served: Served) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1, "other": "x" * 300_000}).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"]
    top = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    for size in (1 << 20, 50_000, 1000):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        assert status(exchange(served, top.encode(), *pieces)) == 200
    with httpx.Client() as client:  # one connection, many heads
        headers = {"a": "x" * 50_000}
        assert [client.get(f"{served.url}/health", headers=headers).status_code for _ in range(4)] == [200] * 4


@pytest.mark.parametrize(
    "host",
    [
        "localhost:80@evil.com",
        "localhost:",
        "localhost:80:80",
        "localhost:x",
        "[::1]evil.com",
        "[::1]:x",
        "[::1",
        "localhost@evil.com",
        "localhost/evil.com",
    ],
)
def test_a_host_that_only_begins_like_this_machine_is_refused(served: Served, host: str) -> None:
    assert httpx.get(f"{served.url}/v1/models", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("hosts", [("evil.com", "localhost"), ("localhost", "evil.com"), ("localhost", "localhost")])
def test_two_hosts_are_refused(served: Served, hosts: tuple[str, str]) -> None:
    said = exchange(
        served, f"GET /v1/models HTTP/1.1\r\nHost: {hosts[0]}\r\nhost: {hosts[1]}\r\nConnection: close\r\n\r\n".encode()
    )
    assert status(said) == 400
    assert b"one header Host" in said
