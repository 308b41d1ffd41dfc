"""The engine in a thread of its own. The thread alone touches the `LLM`, but for its compiler of grammars, which has another thread;
requests and aborts come to it through a queue, and what a step has added goes back to the event loop in one call for all of them."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.grammar import CompiledGrammar
from finback.engine.grammar_config import Grammar
from finback.engine.llm import LLM
from finback.engine.output import Increment

logger = logging.getLogger("finback.server")

TROUBLE = "the engine failed; the server's log says why"
STOP_SECONDS = 30.0
"""How long a step may take to its end when the server stops."""

Made = TypeVar("Made")


def made_apart(make: Callable[[], Made]) -> Made:
    """What `make` returns or raises, made in a thread that ends with it.

    A server's model is loaded so. GNU's OpenMP keeps helpers for every thread that has ever computed, until that thread ends, and once
    it has more of them than there are cores, none waits awake any more: had the main thread loaded the model, every product of the
    engine's thread would begin by waking its helpers, and one request alone would get a quarter fewer tokens a second."""
    made: Future[Made] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    thread = threading.Thread(target=run, name="maker", daemon=True)  # a daemon: Ctrl-C does not wait for it
    thread.start()
    thread.join()
    return made.result()


class EngineFailure(RuntimeError):
    """The engine failed at this request, or in a step of it. Where a step fails, every request that has begun gets this; those of which
    nothing was computed yet go on waiting."""


@dataclass
class Begin:
    """Whether the engine has begun with a request, also with one that is left before its first token."""

    num_cached_tokens: int | None = None
    """Tokens of the prompt that the prefix cache had; None while nothing of it was computed."""


_Answer = asyncio.Queue[Increment | Exception | None]  # None: the engine knows nothing of the request any more


class _Submission(NamedTuple):
    ticket: int
    prompt: list[int]
    params: SamplingParams
    compiled: CompiledGrammar | None
    answer: _Answer


class _Abort(NamedTuple):
    ticket: int
    answer: _Answer


class EngineWorker:
    """Runs an `LLM` until `stop`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._inbox: queue.SimpleQueue[_Submission | _Abort | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next_ticket = 0
        self._grammars = ThreadPoolExecutor(1, "grammars")
        self._answers: set[_Answer] = set()  # of the requests that have not ended
        # Of those that wait until the engine has heard that they were left; None when nobody waits for it any more.
        self._left: set[_Answer] | None = set()

    @property
    def open(self) -> int:
        """Requests that were submitted and have not ended, for the event loop to look at."""
        return len(self._answers)

    def start(self) -> None:
        """Begin; to be called in the event loop that answers are wanted in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> bool:
        """End after the step that runs now; False, and an error in the log, if it takes too long. To be called in the event loop."""
        self.forget()
        self._grammars.shutdown(wait=False, cancel_futures=True)
        self._inbox.put(None)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            logger.error("the engine is still busy with a step after %g s; the server ends without it", STOP_SECONDS)
        return not self._thread.is_alive()

    def end_answers(self, error: Exception) -> None:
        """Whoever waits for an answer now gets `error` behind what was written until here; to be called in the event loop."""
        for answer in self._answers:
            answer.put_nowait(error)

    def forget(self) -> None:
        """Whoever has left an answer, now or from now on, does not wait until the engine has heard of it; to be called in the event
        loop when the server ends."""
        left, self._left = self._left, None
        for answer in left or ():
            answer.put_nowait(None)

    async def answer(self, prompt: list[int], params: SamplingParams, begin: Begin | None = None) -> AsyncIterator[Increment]:
        """The answer: one increment for each step that adds to it, and an empty one before them where a step has begun with the prompt
        and not ended it: before the first, no step has done anything for it. Leaving early aborts the request, which frees its blocks;
        where none has come by then, the end of the step that runs now is waited for, and `begin` tells whether it has begun.

        Raises InputError if the request can never be answered, EngineFailure if the engine failed, and what `end_answers` was given.
        """
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        begin, answer = begin or Begin(), _Answer()
        self._answers.add(answer)
        known = False  # to the engine
        try:
            compiled = None if params.grammar is None else await self._compiled(params.grammar)
            self._inbox.put(_Submission(ticket, prompt, params, compiled, answer))
            known = True
            while known:
                increment = await answer.get()
                assert increment is not None
                if isinstance(increment, Exception):
                    known = not isinstance(increment, InputError | EngineFailure)
                    raise increment
                known = increment.finish_reason is None
                if increment.is_fault:
                    logger.error("the engine failed at a request: %s", increment.error)
                    raise EngineFailure(increment.error)
                if increment.error is not None:
                    raise InputError(increment.error)
                begin.num_cached_tokens = increment.num_cached_tokens
                yield increment
        finally:
            self._answers.discard(answer)
            if known:
                await self._leave(ticket, answer, begin)

    async def _compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Apart from the engine, whose steps go on meanwhile."""
        try:
            return await asyncio.wrap_future(self._grammars.submit(self.llm.compile, grammar))
        except InputError:
            raise
        except Exception:  # a fault of ours at one request
            logger.exception("the engine failed at a grammar")
            raise EngineFailure(TROUBLE) from None

    async def _leave(self, ticket: int, answer: _Answer, begin: Begin) -> None:
        """Abort a request. Until the engine answers with None, what it has done before may still come."""
        self._inbox.put(_Abort(ticket, answer))
        if begin.num_cached_tokens is not None or self._left is None:
            return
        self._left.add(answer)
        try:
            while (part := await answer.get()) is not None:
                if isinstance(part, Increment) and part.error is None:
                    begin.num_cached_tokens = part.num_cached_tokens
        finally:
            if self._left is not None:
                self._left.discard(answer)

    def _run(self) -> None:
        requests: dict[int, _Submission] = {}  # by the engine's id
        ids: dict[int, int] = {}  # ticket -> the engine's id
        new: dict[int, None] = {}  # the engine's ids of those that have not begun, in the order in which they will
        while True:
            message = None
            while not self._inbox.empty() or not self.llm.has_unfinished:
                message = self._inbox.get()
                if message is None:
                    return
                self._take(message, requests, ids, new)
            try:
                increments = self.llm.step()
            except Exception:  # whatever it is, it must end these requests and not the server
                self._begun(new)
                # If none has begun, no step would ever end them.
                failed = [request_id for request_id in requests if request_id not in new] or list(requests)
                logger.exception("the engine failed in a step; %d requests end with it", len(failed))
                self._deliver([(requests[request_id].answer, EngineFailure(TROUBLE)) for request_id in failed])
                for request_id in failed:
                    self.llm.abort(request_id)
                    ids.pop(requests.pop(request_id).ticket)
                    new.pop(request_id, None)
                continue
            ended = {increment.request_id for increment in increments if increment.finish_reason is not None}
            for request_id in ended:
                new.pop(request_id, None)
            told = {increment.request_id for increment in increments}
            begun = [
                Increment(request_id, "", [], None, None, cached)
                for request_id, cached in self._begun(new)
                if request_id not in told
            ]
            parts = [*begun, *(increment for increment in increments if increment.request_id in requests)]
            self._deliver([(requests[increment.request_id].answer, increment) for increment in parts])
            for request_id in ended & requests.keys():
                ids.pop(requests.pop(request_id).ticket)

    def _begun(self, new: dict[int, None]) -> list[tuple[int, int]]:
        """Take those out of `new` that have begun, with the tokens of their prompts that were cached; they begin in their order."""
        begun = []
        for request_id in new:
            cached = self.llm.num_cached_tokens(request_id)
            if cached is None:
                break
            begun.append((request_id, cached))
        for request_id, _ in begun:
            del new[request_id]
        return begun

    def _take(
        self, message: _Submission | _Abort, requests: dict[int, _Submission], ids: dict[int, int], new: dict[int, None]
    ) -> None:
        if isinstance(message, _Abort):
            request_id = ids.pop(message.ticket, None)
            if request_id is not None:
                requests.pop(request_id, None)
                new.pop(request_id, None)
                self.llm.abort(request_id)
            self._deliver([(message.answer, None)])
            return
        try:
            request_id = self.llm.add(message.prompt, message.params, message.compiled)
        except InputError as error:
            self._deliver([(message.answer, error)])
            return
        except Exception:  # a fault of ours at one request: the others and the server go on
            logger.exception("the engine failed at a request")
            self._deliver([(message.answer, EngineFailure(TROUBLE))])
            return
        requests[request_id], ids[message.ticket], new[request_id] = message, request_id, None

    def _deliver(self, parts: Sequence[tuple[_Answer, Increment | InputError | EngineFailure | None]]) -> None:
        """Everything of a step at once: the event loop wakes once."""

        def put() -> None:
            for answer, part in parts:
                answer.put_nowait(part)

        assert self._loop is not None
        if parts and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
