"""What every door needs: the engine, the tokenizer, keys and metrics, and one way to answer a request and account for it."""

import asyncio
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from finback.config import InputError
from finback.data.tokenizer import Tokenizer
from finback.engine.config import DEFAULT_MAX_TOKENS, SamplingParams
from finback.server.config import ServeConfig
from finback.server.errors import APIError
from finback.server.keys import Charge, Charges, Key, KeyStore, Prices, now
from finback.server.metrics import Metrics
from finback.server.turn import Delta, Usage, run_turn
from finback.server.wire import Endings
from finback.server.worker import EngineFailure, EngineWorker

logger = logging.getLogger("finback.server")

FINISH_SECONDS = 5.0
"""How long what ends with the server may take."""
CHARGE_SECONDS = 2.0
"""How long an answer waits for its charge to be written; then it ends, and the charge is written later."""
CLOSE_SECONDS = 60.0
"""How long the server waits at its end for a locked file of keys."""
CHAT_MODEL, REASONER_MODEL = "deepseek-chat", "deepseek-reasoner"


@dataclass
class Service:
    """One model, served."""

    config: ServeConfig
    name: str
    worker: EngineWorker
    tokenizer: Tokenizer
    metrics: Metrics
    store: KeyStore | None
    prices: Prices | None
    version: str
    endings: Endings = field(default_factory=Endings)
    created: int = field(default_factory=lambda: int(time.time()))
    _answering: set[str] = field(default_factory=set)  # the ids of the requests that are not charged yet
    _recent: dict[int, deque[float]] = field(default_factory=dict)  # key id -> when its last requests came
    _charges: Charges | None = None  # made with the first one

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys((CHAT_MODEL, REASONER_MODEL, self.name)))

    @property
    def context(self) -> int:
        return self.worker.llm.max_model_len

    def thinking_of(self, model: str) -> bool | None:
        """Whether a model's name asks for a thought; None leaves it to the template. 400 for a name that is not served."""
        if model not in self.models:
            raise APIError(
                400,
                f"there is no model {model!r} here; there are {', '.join(self.models)}",
                code="model_not_found",
                param="model",
            )
        return {CHAT_MODEL: False, REASONER_MODEL: True}.get(model)

    def allow(self, key: Key | None) -> None:
        """402 where the balance of a request's key is spent, 429 where it asks too often."""
        if key is None:
            return
        self._check_balance(key)
        if key.requests_per_minute is not None:
            recent, moment = self._recent.setdefault(key.id, deque()), time.monotonic()
            while recent and recent[0] <= moment - 60:
                recent.popleft()
            if len(recent) >= key.requests_per_minute:
                wait = math.ceil(recent[0] + 60 - moment) if recent else 60
                raise APIError(
                    429,
                    f"the key {key.name!r} may ask {key.requests_per_minute} times a minute; ask again in {wait} s",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(wait)},
                )
            recent.append(moment)

    def _check_balance(self, key: Key) -> None:
        """402 where the balance, as it was read just now, is spent."""
        owed = 0 if self._charges is None else self._charges.owed(key.id)
        if key.balance <= owed:
            raise APIError(402, f"the balance of the key {key.name!r} is spent; top it up", code="insufficient_balance")

    def key_of(self, headers: Mapping[str, str]) -> Key | None:
        """The key of a request, whatever its balance; None where the server has no keys. 401 without one or with a wrong one."""
        if self.store is None:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            secret = headers.get("x-api-key", "")
        if not secret.strip():
            raise APIError(401, "no key was given; send the header Authorization: Bearer KEY", code="invalid_api_key")
        key = self.store.find(secret.strip())
        if key is None:
            raise APIError(401, "this key is not known here, or it was revoked", code="invalid_api_key")
        return key

    def admit(self) -> None:
        """503 where too many wait already."""
        if self.worker.open >= self.config.max_num_seqs + self.config.max_waiting:
            raise APIError(
                503, "the server is overloaded; ask again in a moment", code="overloaded", headers={"Retry-After": "5"}
            )

    def max_tokens(
        self, asked: int | None, prompt_tokens: int, *, field: str = "max_tokens", prompt_field: str = "messages"
    ) -> int:
        """The longest answer: as asked, up to the room that is left in context and cache; min(4096, room) if nothing was asked.

        `field` and `prompt_field` are the door's names for what APIError blames."""
        room = self.room(prompt_tokens, prompt_field=prompt_field)
        if asked is not None and asked > self.context:
            raise APIError(422, f"field {field} is {asked}, above the model's context ({self.context}); lower it", param=field)
        return min(DEFAULT_MAX_TOKENS if asked is None else asked, room)

    def room(self, prompt_tokens: int, *, prompt_field: str, at_least: bool = False) -> int:
        """Tokens that context and cache leave for an answer; 400 where there are none. `at_least`: the prompt may have more."""
        cache = self.worker.llm.num_cache_tokens + 1  # the last token of an answer is never computed
        room = min(self.context, cache) - prompt_tokens
        if room < 1:
            limit = f"the context is {self.context}" if self.context <= cache else f"the server's cache holds {cache - 1} tokens"
            count = f"at least {prompt_tokens}" if at_least else prompt_tokens
            raise APIError(
                400,
                f"field {prompt_field} makes a prompt of {count} tokens, and {limit}, which leaves no room for an answer; "
                "shorten it",
                code="context_length_exceeded",
                param=prompt_field,
            )
        return room

    def end_answers_in(self, seconds: float) -> None:
        """The server stops: what is not answered by then is cut off, told so, and charged for what was written."""

        error = APIError(503, "the server is stopping; ask again later", code="overloaded")
        asyncio.get_running_loop().call_later(seconds, self.worker.end_answers, error)

    async def finish(self) -> None:
        """Wait until nothing is left to be freed or charged."""
        await self._until_answered()
        self.worker.forget()  # where the engine is stuck in a step
        await self._until_answered()
        await self.endings.finish()
        if self._charges is not None:
            await asyncio.to_thread(self._charges.close, CLOSE_SECONDS)

    async def _until_answered(self) -> None:
        deadline = time.monotonic() + FINISH_SECONDS
        while self._answering and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def params(self, **fields: Any) -> SamplingParams:
        """SamplingParams, None meaning the default; 422 for what cannot be meant."""
        try:
            return SamplingParams(**{name: value for name, value in fields.items() if value is not None})
        except InputError as error:
            raise APIError(422, str(error)) from None

    async def answer(
        self,
        model: str,
        key: Key | None,
        prompt: list[int],
        params: Sequence[SamplingParams],
        usage: Usage,
        turn: Callable[..., AsyncIterator[Delta]] = run_turn,
        **options: Any,
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """One answer for each of `params`, as lists of (index, delta): all that has come since the last, which is what one step of
        the engine has added, or more where the reader is slower. However it ends, it is counted and charged once; but what the
        engine refuses before its first token, or fails at, costs nothing.

        `turn` is `run_turn` or `run_completion`, `options` are what it takes.

        Raises APIError for what the engine refuses, before or in the middle, and where others have spent the balance by the time the
        engine begins, which costs nothing either.
        """
        request_id, start, first = secrets.token_hex(12), time.perf_counter(), None
        begun = False
        usages = [usage] if len(params) == 1 else [Usage() for _ in params]  # one alone is counted in place
        reasons: list[str | None] = [None] * len(params)
        turns = [
            turn(self.worker, self.tokenizer, prompt, one, counted, **options)
            for one, counted in zip(params, usages, strict=True)
        ]
        error: Exception | None = None
        self._answering.add(request_id)
        try:
            async with aclosing(_alone(turns[0]) if len(turns) == 1 else _together(turns)) as steps:
                async for parts in steps:
                    if not begun and key is not None and self.store is not None:
                        self._check_balance(self.store.get(key.id))
                    begun = True
                    deltas = [(index, delta) for index, delta in parts if not delta.is_empty or delta.finish_reason is not None]
                    if not deltas:
                        continue
                    for index, delta in deltas:
                        reasons[index] = delta.finish_reason
                    _add_up(usage, usages)  # each piece of a stream may tell what was used until here
                    if first is None:
                        first = time.perf_counter()
                        usage.seconds_to_first = first - start
                        self.metrics.first_token(first - start)
                    yield deltas
        except Exception as raised:
            error = raised
            raise _api_error(error) from None
        finally:  # also where the server stops meanwhile: what was used is paid
            _add_up(usage, usages)
            end = time.perf_counter()
            spent = isinstance(error, APIError) and error.status == 402
            refused = spent or (isinstance(error, InputError) and not usage.completion_tokens)
            if not refused:
                ended = [reason or (None if error is None else "error") for reason in reasons]
                self.metrics.finished(usage, ended, end - start, None if first is None else end - first)
            logger.debug(
                "%s: %d prompt tokens (%d cached), %d tokens in %.2f s", request_id, usage.prompt_tokens, usage.hit_tokens,
                usage.completion_tokens, end - start,
            )  # fmt: skip
            try:
                failed = error is not None and not isinstance(error, APIError | InputError)
                if not refused and not failed:
                    await self._charge(request_id, model, key, usage)
            finally:
                self._answering.discard(request_id)

    async def _charge(self, request_id: str, model: str, key: Key | None, usage: Usage) -> None:
        """Charge a request, and wait a while until it is written."""
        if self.store is None or key is None or self.prices is None or not usage.prompt_tokens:
            return
        cost = self.prices.cost(usage.hit_tokens, usage.miss_tokens, usage.completion_tokens, now())
        if self._charges is None:
            self._charges = Charges(self.store.file)
        charge = Charge(request_id, key.id, model, usage.hit_tokens, usage.miss_tokens, usage.completion_tokens, cost)
        written = asyncio.wrap_future(self._charges.add(charge))
        if (await asyncio.wait({written}, timeout=CHARGE_SECONDS))[0]:
            written.result()


async def _alone(turn: AsyncIterator[Delta]) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """The steps of one answer: no task of its own and no queue, which take a tenth of all that a token costs the event loop."""
    try:
        async for delta in turn:
            yield [(0, delta)]
    finally:
        await turn.aclose()  # type: ignore[attr-defined]


async def _together(turns: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """The steps of several answers: all that has come since the last, of whichever. Ends with the last of them, or the first error."""
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def read(index: int) -> None:
        # Everything goes through the queue: a task's own exception would be nobody's, and the answer would never end.
        try:
            async for delta in turns[index]:
                queue.put_nowait((index, delta))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))
        finally:
            await turns[index].aclose()  # type: ignore[attr-defined]

    tasks = [asyncio.create_task(read(index)) for index in range(len(turns))]
    left, error = len(tasks), None
    try:
        while left and error is None:
            came, error = await _all_that_came(queue)
            left -= sum(delta is None for _, delta in came)
            deltas = [(index, delta) for index, delta in came if delta is not None]
            if deltas:
                yield deltas
        if error is not None:
            raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all_that_came(
    queue: asyncio.Queue[tuple[int, Delta | Exception | None]],
) -> tuple[list[tuple[int, Delta | None]], Exception | None]:
    """Wait for something, and take whatever else is there: what a step has added to several answers comes together. Up to the first
    error, which comes apart."""
    came: list[tuple[int, Delta | None]] = []
    while not (came and queue.empty()):
        index, delta = await queue.get()
        if isinstance(delta, Exception):
            return came, delta
        came.append((index, delta))
    return came, None


def _api_error(error: Exception) -> Exception:
    """What is told of an engine's error."""
    if isinstance(error, InputError | EngineFailure):
        return APIError(400 if isinstance(error, InputError) else 500, str(error))
    return error


def _add_up(usage: Usage, parts: Sequence[Usage]) -> None:
    """Several answers to one prompt read it once."""
    if parts[0] is usage:
        return
    read = [part for part in parts if part.prompt_tokens]
    usage.prompt_tokens = read[0].prompt_tokens if read else 0
    usage.hit_tokens = max((part.hit_tokens for part in read[:1]), default=0)
    usage.completion_tokens = sum(part.completion_tokens for part in parts)
    usage.reasoning_tokens = sum(part.reasoning_tokens for part in parts)
