"""One answer on its way from the engine to whoever asked: thought, content and tool calls apart, tokens counted, the thought bounded.

No HTTP here. The doors (OpenAI's, Anthropic's, Ollama's) write what comes out in their own words.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from finback.data.reasoning import CLOSE_THOUGHT, ReasoningParser, ToolCallIncrement
from finback.engine.config import SamplingParams
from finback.engine.output import Increment
from finback.engine.sampler import TokenLogprobs

CACHE_UNIT = 64
"""Tokens in which hits are told, whatever the engine's blocks: DeepSeek's storage unit."""


class TokenLogprob(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs


@dataclass
class Usage:
    """Tokens of one answer so far."""

    prompt_tokens: int = 0
    hit_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

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

    @property
    def is_empty(self) -> bool:
        return not (self.reasoning or self.content or self.tool_calls or self.content_logprobs or self.reasoning_logprobs)


class Engine(Protocol):
    """What is needed of `EngineWorker`."""

    def answer(self, prompt: list[int], params: SamplingParams) -> AsyncIterator[Increment]: ...


async def run_turn(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams,
    usage: Usage,
    *,
    thinking: bool,
    tools: bool = False,
    budget: int | None = None,
    close_thought: Callable[[], list[int]] = list,
) -> AsyncIterator[Delta]:
    """The answer to `prompt` in its parts; `usage` counts along, also where the reader leaves early.

    `thinking`: the prompt ends inside a thought. With a `budget`, a thought that reaches so many tokens is ended by the tokens of
    `close_thought()`, and the model goes on behind them.
    """
    parser = ReasoningParser(starts_in_thought=thinking, tools=tools)
    usage.prompt_tokens = len(prompt)
    first, called, written = True, False, list[int]()
    while True:
        closed = False
        stream = engine.answer([*prompt, *written], params)
        try:
            async for increment in stream:
                if first:
                    usage.hit_tokens = increment.num_cached_tokens // CACHE_UNIT * CACHE_UNIT
                    first = False
                written += increment.token_ids
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
                    yield delta
                    return
                if not delta.is_empty:
                    yield delta
                if budget is not None and parser.thought == "open" and usage.reasoning_tokens >= budget:
                    closed = True
                    break
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        if not closed:
            return
        # The thought is as long as it may be: close it, and let the model answer with what is left of max_tokens.
        end = close_thought()
        written += end
        usage.completion_tokens += len(end)
        usage.reasoning_tokens += len(end)
        parts = parser.feed(CLOSE_THOUGHT)
        yield Delta(parts.reasoning, parts.content)
        left = None if params.max_tokens is None else params.max_tokens - usage.completion_tokens
        if left is not None and left < 1:
            yield Delta(finish_reason="length")
            return
        grammar = None if params.grammar is None else replace(params.grammar, after_think=False)
        params, budget = replace(params, max_tokens=left, grammar=grammar), None


async def run_completion(
    engine: Engine, prompt: list[int], params: SamplingParams, usage: Usage, *, close_thought: Callable[[], list[int]] = list
) -> AsyncIterator[Delta]:
    """The continuation of a text as it stands: whatever the model writes is content."""
    usage.prompt_tokens = len(prompt)
    stream = engine.answer(prompt, params)
    first = True
    try:
        async for increment in stream:
            if first:
                usage.hit_tokens = increment.num_cached_tokens // CACHE_UNIT * CACHE_UNIT
                first = False
            usage.completion_tokens += len(increment.token_ids)
            delta = Delta(content=increment.text, finish_reason=increment.finish_reason)
            if increment.logprobs is not None:
                pairs = zip(increment.token_ids, increment.logprobs, strict=True)
                delta.content_logprobs = [TokenLogprob(*pair) for pair in pairs]
            if not delta.is_empty or delta.finish_reason is not None:
                yield delta
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
