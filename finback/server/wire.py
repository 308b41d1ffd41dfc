"""Answers over HTTP that may take long: the connection is kept open, errors that come in time have their status, and a client that has
gone ends its request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from finback.server.errors import APIError

logger = logging.getLogger("finback.server")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    line = b"data: " + orjson.dumps(data) + b"\n\n"
    return line if name is None else f"event: {name}\n".encode() + line


class Endings:
    """What has to be finished after a client has gone: its `finally` frees blocks and writes down what was used. The task that served
    it is cancelled by then, so it is work for tasks of their own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def end(self, pending: "asyncio.Future[Any]", events: AsyncIterator[bytes] | None = None) -> None:
        """Give up what is not finished, and close the events."""
        task = asyncio.create_task(_end(pending, events))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for all of it."""
        await asyncio.gather(*self._tasks)


async def stream(
    request: Request,
    events: AsyncIterator[bytes],
    endings: Endings,
    seconds: float,
    error_event: Callable[[APIError], bytes] = lambda error: event(error.body()),
    media_type: str = "text/event-stream",
    keep_alive: bytes = KEEP_ALIVE,
    first_keep_alive: bytes = KEEP_ALIVE,
) -> Response:
    """Send events as they come; while none comes `keep_alive`, and `first_keep_alive` before the first. An error before the first one,
    within `seconds`, is an answer of its own; of later ones an APIError is an event."""
    iterator = aiter(events)
    pending = asyncio.ensure_future(anext(iterator, None))
    try:
        ready = await _first(request, pending, seconds)
    except BaseException:
        endings.end(pending, events)
        raise
    if ready and (error := pending.exception()) is not None:
        endings.end(pending, events)
        raise error

    async def body() -> AsyncIterator[bytes]:
        nonlocal pending
        patience, came = _Patience(seconds), list[bytes]()

        async def read() -> None:  # one task for all events: one for each costs more than writing it
            async for chunk in iterator:
                came.append(chunk)
                patience.tell()

        try:
            while not await patience.wait(pending):
                yield first_keep_alive
            try:
                if (chunk := pending.result()) is None:
                    return
                yield chunk
                pending = asyncio.ensure_future(read())
                while came or not pending.done():
                    if came:
                        together = b"".join(came)
                        came.clear()
                        yield together
                    elif not await patience.wait(pending) and not came:
                        yield keep_alive
                pending.result()
            except APIError as error:
                yield error_event(error)
        finally:
            patience.end()
            endings.end(pending, events)

    return StreamingResponse(body(), media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def whole(
    request: Request,
    answer: Awaitable[dict[str, Any]],
    endings: Endings,
    seconds: float,
    error_body: Callable[[APIError], dict[str, Any]] = APIError.body,
) -> Response:
    """One JSON body. Where it takes longer than `seconds`, empty lines keep the connection open until it is there."""
    pending = asyncio.ensure_future(answer)
    try:
        ready = await _first(request, pending, seconds)
    except BaseException:
        endings.end(pending)
        raise
    if ready:
        return JSONResponse(pending.result())

    async def body() -> AsyncIterator[bytes]:
        try:
            while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield b"\n"
            try:
                yield orjson.dumps(pending.result())
            except APIError as error:
                yield orjson.dumps(error_body(error))
        finally:
            endings.end(pending)

    return StreamingResponse(body(), media_type="application/json")


class _Patience:
    """Waits for one thing after another, each time for so many seconds at most. There is one timer for all of it: to make one for each
    token and take it back costs as much as writing the token."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._loop = seconds, asyncio.get_running_loop()
        self._since = self._loop.time()
        self._wake: asyncio.Future[None] | None = None
        self._timer = self._loop.call_later(seconds, self._look)

    async def wait(self, pending: "asyncio.Future[Any]") -> bool:
        """Whether it is there; it goes on where it is not. `tell` ends the waiting, too."""
        if not pending.done():
            self._since, self._wake = self._loop.time(), self._loop.create_future()
            pending.add_done_callback(self.tell)
            try:
                await self._wake
            finally:
                pending.remove_done_callback(self.tell)
                self._wake = None
        return pending.done()

    def end(self) -> None:
        self._timer.cancel()

    def tell(self, _: "asyncio.Future[Any] | None" = None) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _look(self) -> None:
        left = self._since + self._seconds - self._loop.time()
        if left <= 0:
            self.tell()
        self._timer = self._loop.call_later(left if left > 0 else self._seconds, self._look)


class ClientGone(Exception):
    """The client has closed the connection; nobody reads what is answered."""


async def _first(request: Request, pending: "asyncio.Future[Any]", seconds: float) -> bool:
    """Wait until it is there, for `seconds` at most; ClientGone if the client leaves before."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait({pending, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if gone in done and pending not in done:
        raise ClientGone
    return pending in done


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(pending: "asyncio.Future[Any]", events: AsyncIterator[bytes] | None) -> None:
    if not pending.done():
        pending.cancel()
    result: Any = (await asyncio.gather(pending, return_exceptions=True))[0]
    if isinstance(result, Exception) and not isinstance(result, APIError):  # which nobody is left to hear
        logger.error("a request failed after its client had gone", exc_info=result)
    if events is not None:
        await events.aclose()  # type: ignore[attr-defined]
