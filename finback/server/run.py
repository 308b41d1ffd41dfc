"""uvicorn, ended as a server should end: no new requests, a grace for those that are being answered, the rest told and paid for."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from finback.server.app import create_app
from finback.server.errors import APIError
from finback.server.service import Service

BEYOND_GRACE = 5.0  # seconds until uvicorn cancels what has not ended by itself
MAX_HEAD_BYTES = 64 * 1024


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol, which alone would take in a head of any size: 431 where it is larger than 64 KiB, and the connection ends.

    A head that has ended is measured by its parts; one that has not, and what stands behind a body, by what was received since anything
    was whole."""

    _head_bytes = 0
    _unused_bytes = 0
    _refused = False

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # what was on its way when the connection was closed
        self._unused_bytes += len(data)
        super().data_received(data)
        if self._unused_bytes > MAX_HEAD_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unused_bytes = 0
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unused_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unused_bytes = 0
        if not self._refused:
            super().on_message_complete()

    def _refuse(self) -> None:
        """In OpenAI's shape whatever the door, which may not be known yet. An answer that is being written ends."""
        if self._refused:
            return
        self._refused = True
        if self.cycle is None or self.cycle.response_complete:
            error = APIError(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers")
            body = orjson.dumps(error.body())
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """A server over a service."""

    def __init__(self, service: Service) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning" if config.log_level == "info" else config.log_level,
                access_log=False,  # its lines would hold what stands in a query
                lifespan="on",
                http=BoundedHeads,  # httptools has a third of h11's time for each token
                loop="auto",  # uvloop, a tenth less than asyncio's own; that one on Windows
                ws="none",
                timeout_graceful_shutdown=int(config.grace_seconds + BEYOND_GRACE) + 1,
            )
        )
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when it has been told to end."""
        self._service.end_answers_in(self._service.config.grace_seconds)
        await super().shutdown(sockets)


@contextmanager
def stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Ctrl-C and SIGTERM are how a server ends, and no failure: uvicorn ends on them, and raises them once more when it has, which
    ends here."""

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
