"""uvicorn, ended as a server should end: no new requests, a grace for those that are being answered, the rest told and paid for."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from finback.server.app import create_app
from finback.server.service import Service

BEYOND_GRACE = 5.0  # seconds until uvicorn cancels what has not ended by itself


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
                http="httptools",  # a third of h11's time for each token
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
