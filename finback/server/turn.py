"""One answer on its way from the engine to whoever asked: thought, content and tool calls apart, tokens counted, the thought bounded.

No HTTP here. The doors (OpenAI's, Anthropic's, Ollama's) write what comes out in their own words.
"""

import codecs
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from finback.data.reasoning import CLOSE_THOUGHT, ReasoningParser, ToolCallIncrement
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams
from finback.engine.output import Increment
from finback.engine.sampler import TokenLogprobs
from finback.server.worker import Begin

CACHE_UNIT = 64
"""Tokens in which hits are told, whatever the engine's blocks: DeepSeek's storage unit."""


class TokenLogprob(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs


@dataclass
class Usage:
    """Tokens of one answer so far."""

    prompt_tokens: int = 0
    """0 until the engine has begun with the prompt: what waits costs nothing."""
    hit_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    seconds_to_first: float | None = None
    """From the request to its first token, once it is there."""

    @property
    def miss_tokens(self) -> int:
        return self.prompt_tokens - self.hit_tokens


@dataclass
class Delta:
    """What one step has added."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallIncrement, ...] = ()
    reasoning_logprobs: list[TokenLogprob] = field(default_factory=list)
    content_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # stop, length or tool_calls; None until the last
    stop_text: str | None = None  # with the last: the text of `stop` that ended the answer, if one did

    @property
    def is_empty(self) -> bool:
        return not (self.reasoning or self.content or self.tool_calls or self.content_logprobs or self.reasoning_logprobs)


class Engine(Protocol):
    """What is needed of `EngineWorker`."""

    def answer(self, prompt: list[int], params: SamplingParams, begin: Begin) -> AsyncIterator[Increment]: ...


async def run_turn(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: list[int],
    params: SamplingParams,
    usage: Usage,
    *,
    thinking: bool,
    begun: bool = False,
    tools: bool = False,
    budget: int | None = None,
) -> AsyncIterator[Delta]:
    """The answer to `prompt` in its parts; `usage` counts along, also where the reader leaves early. Where the engine begins before it
    has anything to say, an empty part tells so.

    `thinking`: the prompt ends inside a thought; `begun`: in the middle of its words. With a `budget`, a thought that reaches so many
    tokens is ended in the model's place, and the model goes on behind it; a character that is not whole by then is left out. Where
    `max_tokens` leaves no room behind the end of the thought, the answer ends there.
    """
    parser = ReasoningParser(starts_in_thought=thinking, begun=begun, tools=tools)
    begin, called, written, text = Begin(), False, list[int](), ""
    while True:
        closed = False
        stream = engine.answer([*prompt, *written], params, begin)
        try:
            async for increment in stream:
                begins = not usage.prompt_tokens
                _count_prompt(usage, prompt, begin)
                written += increment.token_ids
                text += increment.text
                was_open = parser.thought == "open"
                parts = parser.feed(increment.text)
                in_thought = was_open or parser.thought == "open" or bool(parts.reasoning)
                usage.completion_tokens += len(increment.token_ids)
                usage.reasoning_tokens += len(increment.token_ids) if in_thought else 0
                delta = Delta(parts.reasoning, parts.content, parts.tool_calls)
                if increment.logprobs is not None:
                    pairs = [TokenLogprob(*pair) for pair in zip(increment.token_ids, increment.logprobs, strict=True)]
                    (delta.reasoning_logprobs if in_thought else delta.content_logprobs).extend(pairs)
                called = called or bool(parts.tool_calls)
                if increment.finish_reason is not None:
                    rest = parser.finish()
                    called = called or bool(rest.tool_calls)
                    delta.reasoning += rest.reasoning
                    delta.content += rest.content
                    delta.tool_calls += rest.tool_calls
                    delta.finish_reason = (
                        "tool_calls" if called and increment.finish_reason == "stop" else increment.finish_reason
                    )
                    delta.stop_text = increment.stop_reason
                    yield delta
                    return
                if begins or not delta.is_empty:
                    yield delta
                if budget is not None and parser.thought == "open" and usage.reasoning_tokens >= budget:
                    closed = True
                    break
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
            _count_prompt(usage, prompt, begin)
        if not closed:
            return
        # The thought is as long as it may be: close it, and let the model answer with what is left of max_tokens.
        written, said = _whole_characters(tokenizer, written)
        unsaid = said[len(text) :]  # the engine held back what might have become a stop text
        end = tokenizer.encode(CLOSE_THOUGHT)
        left = None if params.max_tokens is None else params.max_tokens - usage.completion_tokens - len(end)
        if left is not None and left < 1:
            yield Delta(parser.feed(unsaid).reasoning + parser.finish().reasoning, finish_reason="length")
            return
        written += end
        usage.completion_tokens += len(end)
        usage.reasoning_tokens += len(end)
        parts = parser.feed(unsaid + CLOSE_THOUGHT)
        yield Delta(parts.reasoning, parts.content)
        grammar = None if params.grammar is None else replace(params.grammar, after_think=False)
        params, budget = replace(params, max_tokens=left, grammar=grammar), None


def _whole_characters(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[list[int], str]:
    """The tokens without an unfinished character at their end, and their text as the engine tells it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    whole, text, rest = 0, "", ""
    for place, token_id in enumerate(token_ids, start=1):
        if token_id not in tokenizer.control_token_ids:
            rest += decoder.decode(tokenizer.token_bytes(token_id))
        if not decoder.getstate()[0]:
            whole, text, rest = place, text + rest, ""
    return [*token_ids[:whole], *tokenizer.encode(rest)], text + rest  # a token may end one character and begin the next


async def run_completion(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams, usage: Usage
) -> AsyncIterator[Delta]:
    """The continuation of a text as it stands: whatever the model writes is content."""
    stream = engine.answer(prompt, params, begin := Begin())
    try:
        async for increment in stream:
            begins = not usage.prompt_tokens
            _count_prompt(usage, prompt, begin)
            usage.completion_tokens += len(increment.token_ids)
            delta = Delta(content=increment.text, finish_reason=increment.finish_reason, stop_text=increment.stop_reason)
            if increment.logprobs is not None:
                pairs = zip(increment.token_ids, increment.logprobs, strict=True)
                delta.content_logprobs = [TokenLogprob(*pair) for pair in pairs]
            if begins or not delta.is_empty or delta.finish_reason is not None:
                yield delta
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
        _count_prompt(usage, prompt, begin)


def _count_prompt(usage: Usage, prompt: Sequence[int], begin: Begin) -> None:
    """Once the engine has begun, before which it had nothing to do with the prompt."""
    if not usage.prompt_tokens and begin.num_cached_tokens is not None:
        usage.prompt_tokens = len(prompt)
        usage.hit_tokens = begin.num_cached_tokens // CACHE_UNIT * CACHE_UNIT
