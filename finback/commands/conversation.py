"""A conversation with the engine: what enters the prompt, what leaves it when the context is full, and answers as streams of parts.

No terminal here: `finback chat` shows what comes out.
"""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from finback.config import InputError
from finback.data.reasoning import Increment, ReasoningParser, opens_thought
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams


@runtime_checkable  # annotations are checked under pytest
class Part(Protocol):
    """What the engine gives at each step: text and tokens since the step before, and why it ended (None until the last)."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def num_cached_tokens(self) -> int: ...


@runtime_checkable
class Engine(Protocol):
    """What a conversation needs of `finback.LLM`. Leaving a stream before its end aborts the request."""

    @property
    def max_model_len(self) -> int: ...
    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Part]: ...


@dataclass
class Answer:
    """One answer as far as it has come; times in seconds since it was asked for."""

    prompt_tokens: int
    reasoning: str = ""
    content: str = ""
    tokens: int = 0
    first_tokens: int = 0  # of the first step that gave any
    cached_tokens: int = 0  # of the prompt
    thought_tokens: int = 0
    thought_seconds: float = 0.0
    first_seconds: float = 0.0
    seconds: float = 0.0
    in_thought: bool = False
    finish_reason: str | None = None  # None: it was stopped by the user

    @property
    def tokens_per_second(self) -> float | None:
        """Of the steps after the first, which also reads the prompt; None where there is no second step."""
        if self.tokens == self.first_tokens or self.seconds <= self.first_seconds:
            return None
        return (self.tokens - self.first_tokens) / (self.seconds - self.first_seconds)


Steps = Generator[tuple[str, str, Answer], None, None]


class Conversation:
    """The messages so far and how the next answer is sampled.

    `messages` holds user and assistant turns, thoughts apart under `reasoning_content`; they are kept for the record and never enter a
    prompt (DeepSeek's rule). Turns that no longer fit the context leave the prompt, oldest first, but not the record.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        system: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.params = params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.dropped = 0
        """Messages, from the oldest, that have left the prompt."""
        self._clock = clock
        self._answers = 0

    def clear(self) -> None:
        """Forget every message; the system prompt stays."""
        self.messages, self.dropped = [], 0

    def record(self) -> list[dict[str, str]]:
        """Every message, the system prompt first."""
        return [*self._system_message(), *self.messages]

    def ask(self, text: str) -> Steps:
        """Answer a user's message: `(reasoning, content, answer so far)` for each step of the engine.

        When the iteration is left early, what has come of the answer stays in the conversation. Where none can begin (InputError), the
        conversation is as before.
        """
        yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def ask_again(self) -> Steps:
        """Like `ask`, a new answer to the last question in the place of the old one; InputError if there is none."""
        if not self.messages:
            raise InputError("there is no answer to make again; ask something first")
        yield from self._answer(self.messages[:-1])

    def _answer(self, messages: list[dict[str, str]]) -> Steps:
        before = self.messages, self.dropped
        self.messages = messages
        start = self._clock()
        try:
            prompt, ids = self._prompt()
            stream = self.engine.stream(ids, self._request_params(len(ids)))
            answer = Answer(len(ids))
            parser = ReasoningParser(starts_in_thought=opens_thought(prompt), tools=False)
            answer.in_thought = parser.thought == "open"
            part = next(stream, None)
        except BaseException:
            self.messages, self.dropped = before
            raise
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        self._answers += 1
        try:
            while part is not None:
                answer.seconds = self._clock() - start
                if not answer.tokens:
                    answer.first_seconds, answer.first_tokens = answer.seconds, len(part.token_ids)
                answer.tokens += len(part.token_ids)
                answer.cached_tokens = part.num_cached_tokens
                answer.finish_reason = part.finish_reason
                increment = parser.feed(part.text)
                if answer.in_thought or parser.thought == "open" or increment.reasoning:
                    answer.thought_tokens += len(part.token_ids)
                    answer.thought_seconds = answer.seconds
                answer.in_thought = parser.thought == "open"
                _add(message, answer, increment)
                yield increment.reasoning, increment.content, answer
                part = next(stream, None)
            rest = parser.finish()
            _add(message, answer, rest)
            yield rest.reasoning, rest.content, answer
        except BaseException:  # left early
            _add(message, answer, parser.finish())
            raise
        finally:
            if isinstance(stream, Generator):
                stream.close()

    def _request_params(self, prompt_tokens: int) -> SamplingParams:
        params = self.params
        if params.max_tokens is not None:
            params = replace(params, max_tokens=min(params.max_tokens, self.engine.max_model_len - prompt_tokens))
        if params.seed is not None:  # so that an answer that is made again is another one
            params = replace(params, seed=(params.seed + self._answers) % 2**63)
        return params

    def _prompt(self) -> tuple[str, list[int]]:
        """The prompt for the next answer as text and tokens, old turns dropped until it leaves room for an answer."""
        limit = self.engine.max_model_len
        room = min(self.params.max_tokens or limit, max(1, limit // 4))
        while True:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in self.messages[self.dropped :]]
            prompt = self.tokenizer.apply_chat_template([*self._system_message(), *turns], add_generation_prompt=True)
            ids = self.tokenizer.encode(prompt)
            if len(ids) + room <= limit:
                return prompt, ids
            if len(turns) == 1:
                raise InputError(
                    f"message and system prompt have {len(ids)} tokens and an answer needs {room} more, the context is {limit}; "
                    "shorten the message"
                )
            self.dropped += 2  # a question and its answer

    def _system_message(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []


def _add(message: dict[str, str], answer: Answer, increment: Increment) -> None:
    answer.reasoning += increment.reasoning
    answer.content += increment.content
    message["content"] = answer.content
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
