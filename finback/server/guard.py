"""What stands before the routes: a wall against bodies that are too large and hosts that are not this machine; and errors in the words
of each door."""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse, Response

from finback.server import anthropic, ollama
from finback.server.config import ServeConfig, is_loopback
from finback.server.errors import APIError

_HOST = re.compile(r"(\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^][:@/]+))(:[0-9]+)?")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def error_response(path: str, error: APIError) -> Response:
    """In the words of the door that was knocked at."""
    status, body = error.status, error.body()
    if path.startswith(("/v1/messages", "/api/")):
        status = 404 if error.code == "model_not_found" else status
        body = (ollama if path.startswith("/api/") else anthropic).error_body(error)
    return JSONResponse(body, status, headers=error.headers)


class Guard:
    """Refuses bodies that are too large while they arrive, and, without keys, requests that do not name this machine: a web page that
    has its own name point here (DNS rebinding) names itself."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if sum(name == b"host" for name, _ in scope["headers"]) > 1:  # a proxy before us may have looked at the other one
            await _refuse(scope["path"], send, APIError(400, "the request names two hosts; send one header Host"))
            return
        if self.config.keys is None and not is_loopback(_host_name(headers.get("host", ""))):
            await _refuse(
                scope["path"],
                send,
                APIError(403, "without keys this server answers only requests to localhost; start it with --keys FILE"),
            )
            return
        limit, read = self.config.max_request_bytes, 0
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            await _refuse(scope["path"], send, _too_large(limit))
            return

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            before, read = read, read + len(message.get("body", b""))
            if read <= limit:
                return message
            if before <= limit:
                await _refuse(scope["path"], send, _too_large(limit))
            return {"type": "http.disconnect"}  # for the application the client is gone

        async def unless_refused(message: Message) -> None:
            if read <= limit:
                await send(message)

        await self.app(scope, counted, unless_refused)


def _too_large(limit: int) -> APIError:
    return APIError(413, f"the body is larger than {limit} bytes; shorten it", code="request_too_large")


def _host_name(host: str) -> str:
    """Without the port, in small letters: [::1]:8000 -> ::1; empty where it is no host."""
    found = _HOST.fullmatch(host.lower())
    return (found["address"] or found["name"]) if found else ""


async def _refuse(path: str, send: Send, error: APIError) -> None:
    response = error_response(path, error)
    start = {"type": "http.response.start", "status": error.status, "headers": response.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": response.body})
