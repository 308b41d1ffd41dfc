"""The engine in a thread of its own. The thread alone touches the `LLM`; requests and aborts come to it through a queue, and what a
step has added goes back to the event loop in one call for all of them."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.output import Increment

logger = logging.getLogger("finback.server")


class EngineFailure(RuntimeError):
    """The engine failed in a step in which this request ran. The others that run with it get the same; those that wait go on."""


class _Submission(NamedTuple):
    ticket: int
    prompt: list[int]
    params: SamplingParams
    answer: "asyncio.Queue[Increment | InputError | EngineFailure]"


class _Abort(NamedTuple):
    ticket: int


class EngineWorker:
    """Runs an `LLM` until `stop`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._inbox: queue.SimpleQueue[_Submission | _Abort | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_ticket = 0
        self.open = 0
        """Requests that were submitted and have not ended, for the event loop to look at."""

    def start(self) -> None:
        """Begin; to be called in the event loop that answers are wanted in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs now."""
        self._inbox.put(None)
        self._thread.join()

    async def answer(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Increment]:
        """The answer, one increment for each step that adds to it. Leaving early aborts the request, which frees its blocks.

        Raises InputError if the request can never be answered, EngineFailure if the engine failed.
        """
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        answer: asyncio.Queue[Increment | InputError | EngineFailure] = asyncio.Queue()
        self._inbox.put(_Submission(ticket, prompt, params, answer))
        self.open += 1
        finished = False
        try:
            while not finished:
                increment = await answer.get()
                if isinstance(increment, Exception):
                    finished = True
                    raise increment
                finished = increment.finish_reason is not None
                if increment.error is not None:
                    raise InputError(increment.error)
                yield increment
        finally:
            self.open -= 1
            if not finished:
                self._inbox.put(_Abort(ticket))

    def _run(self) -> None:
        requests: dict[int, _Submission] = {}  # by the engine's id
        ids: dict[int, int] = {}  # ticket -> the engine's id
        while True:
            message = None
            while not self._inbox.empty() or not self.llm.has_unfinished:
                message = self._inbox.get()
                if message is None:
                    return
                self._take(message, requests, ids)
            try:
                increments = self.llm.step()
            except Exception:  # whatever it is, it must end these requests and not the server
                logger.exception("the engine failed in a step of %d requests", len(requests))
                failed = list(requests.values())
                for request_id in list(requests):
                    self.llm.abort(request_id)
                requests.clear()
                ids.clear()
                self._deliver([(request, EngineFailure("the engine failed; the server's log says why")) for request in failed])
                continue
            self._deliver(
                [(requests[increment.request_id], increment) for increment in increments if increment.request_id in requests]
            )
            for increment in increments:
                if increment.finish_reason is not None and increment.request_id in requests:
                    ids.pop(requests.pop(increment.request_id).ticket)

    def _take(self, message: _Submission | _Abort, requests: dict[int, _Submission], ids: dict[int, int]) -> None:
        if isinstance(message, _Abort):
            request_id = ids.pop(message.ticket, None)
            if request_id is not None:
                requests.pop(request_id, None)
                self.llm.abort(request_id)
            return
        try:
            request_id = self.llm.add(message.prompt, message.params)
        except InputError as error:
            self._deliver([(message, error)])
            return
        requests[request_id], ids[message.ticket] = message, request_id

    def _deliver(self, parts: "Sequence[tuple[_Submission, Increment | InputError | EngineFailure]]") -> None:
        """Everything of a step at once: the event loop wakes once."""

        def put() -> None:
            for request, part in parts:
                request.answer.put_nowait(part)

        assert self._loop is not None
        if parts and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
