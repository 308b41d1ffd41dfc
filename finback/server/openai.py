"""OpenAI's and DeepSeek's door: /chat/completions, /completions (FIM with suffix), and what they answer."""

import codecs
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from finback.config import InputError
from finback.data.reasoning import ToolCallIncrement
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams
from finback.engine.grammar_config import Grammar
from finback.server.errors import APIError
from finback.server.keys import Key
from finback.server.prompt import LONG_TEXT, Prompt, chat_prompt, fim_prompt, tokenized
from finback.server.schemas import ChatRequest, CompletionRequest, ResponseFormat, Sampling, StreamOptions, Thinking
from finback.server.service import Service
from finback.server.turn import Delta, TokenLogprob, Usage, run_completion
from finback.server.wire import DONE, event


@dataclass
class Job:
    """A chat request, checked and turned into what the engine takes."""

    model: str
    key: Key | None
    token_ids: list[int]
    prompt: Prompt
    params: list[SamplingParams]
    tools: bool
    budget: int | None
    usage: Usage = field(default_factory=Usage)

    def deltas(self, service: Service) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        return service.answer(
            self.model, self.key, self.token_ids, self.params, self.usage,
            thinking=self.prompt.thinking, begun=self.prompt.begun, tools=self.tools, budget=self.budget,
        )  # fmt: skip


def chat_job(service: Service, body: ChatRequest, key: Key | None, names: Mapping[str, str] | None = None) -> Job:
    """Raises APIError for what cannot be answered; it calls the fields as the door does where `names` has them."""
    service.thinking_of(body.model)
    service.admit()
    tools = _tools(body)
    prompt, prompt_field = conversation_prompt(service, body), (names or {}).get("messages", "messages")
    token_ids = _tokens_that_fit(service, prompt.text, prompt_field)
    grammar = _grammar(body, tools, after_think=prompt.thinking)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    params = _params(
        service, body, len(token_ids), key, limit=limit, prompt_field=prompt_field, names=names or {},
        grammar=grammar, logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )  # fmt: skip
    bounded = isinstance(body.thinking, Thinking) and body.thinking.budget_tokens
    return Job(body.model, key, token_ids, prompt, params, bool(tools), bounded or body.thinking_budget)


def conversation_prompt(service: Service, body: ChatRequest) -> Prompt:
    """What the model reads of a conversation, however long it is. Raises APIError for what cannot be written."""
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    return chat_prompt(service.tokenizer, messages, thinking=_thinking(service, body), tools=_tools(body))


def _tokens_that_fit(service: Service, text: str, prompt_field: str, *, add_bos: bool = False) -> list[int]:
    """The token ids of a prompt. A text that cannot fit, whatever its tokens are, is refused before they are looked for."""
    most = service.tokenizer.most_bytes_per_token if len(text) > LONG_TEXT else None
    if most is not None:
        service.room(-(-len(text.encode()) // most), prompt_field=prompt_field, at_least=True)
    return tokenized(service.tokenizer, text, add_bos=add_bos)


def _thinking(service: Service, body: ChatRequest) -> bool | None:
    """Whether the model shall think; None leaves it to the template."""
    thinking = service.thinking_of(body.model)
    if isinstance(body.thinking, bool):
        return body.thinking
    if isinstance(body.thinking, Thinking):
        return {"enabled": True, "disabled": False}.get(body.thinking.type, thinking)
    return thinking


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that are offered."""
    if body.tool_choice not in (None, "auto", "none") and not body.tools:
        raise APIError(
            422, "field tool_choice asks for a call, but there are no tools; give the field tools", param="tool_choice"
        )
    return [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or []]


def _grammar(body: ChatRequest, tools: list[dict[str, Any]], *, after_think: bool) -> Grammar | None:
    form = body.response_format
    if not tools:
        return form_grammar(form, after_think=after_think)
    if form is not None and form.type != "text":
        raise APIError(422, "response_format and tools cannot be asked for together; leave one out", param="response_format")
    choice = body.tool_choice or "auto"
    named = choice if isinstance(choice, str) else choice.model_dump()
    try:
        return Grammar.tool_calls(tools, named, parallel=body.parallel_tool_calls is not False, after_think=after_think)
    except InputError as error:
        raise APIError(422, str(error), param="tools") from None


def form_grammar(form: ResponseFormat | None, *, after_think: bool = False) -> Grammar | None:
    """The grammar of a response_format; None where any text will do."""
    if form is None or form.type == "text":
        return None
    try:
        if form.json_schema is not None and form.type == "json_schema":
            return Grammar.json_schema(form.json_schema.schema_, after_think=after_think)
        return Grammar.json_object(after_think=after_think)
    except InputError as error:
        raise APIError(422, str(error), param="response_format") from None


def _params(
    service: Service, body: Sampling, prompt_tokens: int, key: Key | None, *, limit: str, prompt_field: str, names: Mapping[str, str],
    **more: Any,
) -> list[SamplingParams]:  # fmt: skip
    """For each of the n answers its own; those after the first have seeds that follow. `limit` is the field with the longest answer."""
    max_tokens = service.max_tokens(getattr(body, limit), prompt_tokens, field=names.get(limit, limit), prompt_field=prompt_field)
    bias = None
    if body.logit_bias:
        try:
            bias = {int(token): value for token, value in body.logit_bias.items()}
        except ValueError:
            raise APIError(422, "field logit_bias maps token ids, whole numbers, to values", param="logit_bias") from None
    cache_key = "" if key is None else f"{key.id} {key.created}"
    fields = {
        "temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p,
        "frequency_penalty": body.frequency_penalty, "presence_penalty": body.presence_penalty, "logit_bias": bias,
        "stop": body.stop, "ignore_eos": body.ignore_eos,
        "max_tokens": max_tokens, "cache_key": cache_key, **more,
    }  # fmt: skip
    return [
        service.params(seed=None if body.seed is None else (body.seed + index) % 2**63, **fields) for index in range(body.n or 1)
    ]


def chat_events(service: Service, body: ChatRequest, job: Job) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events: those of one step of the engine, of all n answers, in one piece, and the last with [DONE]."""
    head = _head("chat.completion.chunk", "chatcmpl", body.model)
    options = body.stream_options or StreamOptions()
    calls = [Calls() for _ in job.params]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **_usage_so_far(options, job.usage)})

    opened: set[int] = set()

    def chunks(index: int, part: Delta) -> bytes:
        out = b"" if index in opened else chunk(index, {"role": "assistant", "content": ""})
        opened.add(index)
        delta: dict[str, Any] = {}
        if part.reasoning:
            delta[body.reasoning_field] = part.reasoning
        if part.content:
            delta["content"] = part.content
        if part.tool_calls:
            delta["tool_calls"] = [calls[index].delta(call) for call in part.tool_calls]
        if delta or part.finish_reason or part.content_logprobs or part.reasoning_logprobs:
            out += chunk(index, delta, part.finish_reason, _chat_logprobs(service.tokenizer, body, part))
        return out

    def end() -> bytes:
        return (event({**head, "choices": [], "usage": usage_body(job.usage)}) if options.with_usage else b"") + DONE

    return written(job.deltas(service), len(job.params), chunks, end)


async def written(
    steps: AsyncGenerator[list[tuple[int, Delta]], None], n: int, part: Callable[[int, Delta], bytes], end: Callable[[], bytes]
) -> AsyncGenerator[bytes, None]:
    """One piece of bytes for each step: what `part` makes of its deltas. The last one waits until the request is accounted for, and
    ends with what `end` makes then."""
    finished, last = 0, b""
    async with aclosing(steps) as opened:
        async for deltas in opened:
            out = b"".join(part(index, delta) for index, delta in deltas)
            finished += sum(delta.finish_reason is not None for _, delta in deltas)
            if finished == n:
                last = out
            elif out:
                yield out
    yield last + end()


async def chat_answer(service: Service, body: ChatRequest, job: Job) -> dict[str, Any]:
    """The answer in one piece."""
    wholes = await gathered(job.deltas(service), len(job.params))
    calls = [Calls.of(part) for part in wholes]
    choices = []
    for index, (part, made) in enumerate(zip(wholes, calls, strict=True)):
        message: dict[str, Any] = {"role": "assistant", "content": part.content}
        if job.prompt.thinking or part.reasoning:
            message[body.reasoning_field] = part.reasoning
        if made.calls:
            message["tool_calls"] = made.calls
            message["content"] = part.content or None
        logprobs = _chat_logprobs(service.tokenizer, body, part)
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": part.finish_reason})
    return {**_head("chat.completion", "chatcmpl", body.model), "choices": choices, "usage": usage_body(job.usage)}


async def gathered(steps: AsyncGenerator[list[tuple[int, Delta]], None], n: int) -> list[Delta]:
    """All steps of n answers together."""
    wholes = [Delta() for _ in range(n)]
    async with aclosing(steps) as opened:
        async for deltas in opened:
            for index, part in deltas:
                _add(wholes[index], part)
    return wholes


@dataclass
class CompletionJob:
    model: str
    key: Key | None
    token_ids: list[int]
    params: list[SamplingParams]
    echo: str
    usage: Usage = field(default_factory=Usage)

    def deltas(self, service: Service) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        return service.answer(self.model, self.key, self.token_ids, self.params, self.usage, turn=run_completion)


def completion_job(
    service: Service,
    body: CompletionRequest,
    key: Key | None,
    grammar: Grammar | None = None,
    names: Mapping[str, str] | None = None,
) -> CompletionJob:
    """Raises APIError for what cannot be answered; it calls the fields as the door does where `names` has them."""
    service.thinking_of(body.model)
    service.admit()
    tokenizer = service.tokenizer
    text = body.prompt if body.suffix is None else fim_prompt(tokenizer, body.prompt, body.suffix)
    token_ids = _tokens_that_fit(service, text, "prompt", add_bos=tokenizer.add_bos_token)
    if not token_ids:
        raise APIError(
            400, "the prompt is empty, and this tokenizer starts with no token of its own; give some text", param="prompt"
        )
    params = _params(
        service, body, len(token_ids), key, limit="max_tokens", prompt_field="prompt", names=names or {},
        grammar=grammar, logprobs=body.logprobs,
    )  # fmt: skip
    return CompletionJob(body.model, key, token_ids, params, body.prompt if body.echo else "")


def completion_events(service: Service, body: CompletionRequest, job: CompletionJob) -> AsyncGenerator[bytes, None]:
    head = _head("text_completion", "cmpl", body.model)
    options = body.stream_options or StreamOptions()
    offsets: dict[int, Offsets] = {}  # of the answers that have begun

    def chunk(index: int, part: Delta) -> bytes:
        text = part.content
        if index not in offsets:
            text, offsets[index] = job.echo + text, Offsets(service.tokenizer, len(job.echo))
        choice = {
            "index": index, "text": text, "finish_reason": part.finish_reason,
            "logprobs": _text_logprobs(service.tokenizer, body, part, offsets[index]),
        }  # fmt: skip
        return event({**head, "choices": [choice], **_usage_so_far(options, job.usage)})

    def end() -> bytes:
        return (event({**head, "choices": [], "usage": usage_body(job.usage)}) if options.with_usage else b"") + DONE

    return written(job.deltas(service), len(job.params), chunk, end)


async def completion_answer(service: Service, body: CompletionRequest, job: CompletionJob) -> dict[str, Any]:
    wholes = await gathered(job.deltas(service), len(job.params))
    choices = [
        {"index": index, "text": job.echo + part.content, "finish_reason": part.finish_reason,
         "logprobs": _text_logprobs(service.tokenizer, body, part, Offsets(service.tokenizer, len(job.echo)))}
        for index, part in enumerate(wholes)
    ]  # fmt: skip
    return {**_head("text_completion", "cmpl", body.model), "choices": choices, "usage": usage_body(job.usage)}


def _usage_so_far(options: StreamOptions, usage: Usage) -> dict[str, Any]:
    """What every chunk but the last has of the usage: no field, null, or what was used until here."""
    if not options.with_usage:
        return {}
    return {"usage": usage_body(usage) if options.continuous_usage_stats else None}


def usage_body(usage: Usage) -> dict[str, Any]:
    """Zeros are told, not left out."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": usage.hit_tokens,
        "prompt_cache_miss_tokens": usage.miss_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.hit_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _add(whole: Delta, part: Delta) -> None:
    """Append a step to what came before."""
    whole.reasoning += part.reasoning
    whole.content += part.content
    whole.tool_calls += part.tool_calls
    whole.reasoning_logprobs += part.reasoning_logprobs
    whole.content_logprobs += part.content_logprobs
    whole.finish_reason = part.finish_reason or whole.finish_reason
    whole.stop_text = part.stop_text or whole.stop_text


class Calls:
    """The tool calls of one answer as they grow."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @classmethod
    def of(cls, whole: Delta) -> "Calls":
        """Those of a whole answer."""
        made = cls()
        for part in whole.tool_calls:
            made.delta(part)
        return made

    def delta(self, part: ToolCallIncrement) -> dict[str, Any]:
        """The increment on the wire; the first of a call carries its id, type and name."""
        if part.index == len(self.calls):
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": part.name, "arguments": ""}}
            self.calls.append(call)
            self.calls[-1]["function"]["arguments"] += part.arguments
            return {"index": part.index, **call, "function": {"name": part.name, "arguments": part.arguments}}
        self.calls[part.index]["function"]["arguments"] += part.arguments
        return {"index": part.index, "function": {"arguments": part.arguments}}


def parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments as an object; one with what came under "arguments" where it is cut, no object, or nothing that an answer
    could hold: JSON has words for numbers without end and for halves of surrogate pairs."""
    text = call["function"]["arguments"]
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
        orjson.dumps(value)  # whole numbers of 64 bits, text in Unicode
    except (ValueError, orjson.JSONEncodeError, RecursionError):  # ValueError: a JSONDecodeError, or thousands of digits
        value = text
    return value if isinstance(value, dict) else {"arguments": value}


def _head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": "finback",
    }


def _chat_logprobs(tokenizer: Tokenizer, body: ChatRequest, part: Delta) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {
        "content": [_token(tokenizer, item) for item in part.content_logprobs],
        "reasoning_content": [_token(tokenizer, item) for item in part.reasoning_logprobs],
    }


def _token(tokenizer: Tokenizer, item: TokenLogprob) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    top = [entry(token_id, logprob) for token_id, logprob in item.logprobs.top]
    return {**entry(item.token_id, item.logprobs.logprob), "top_logprobs": top}


def _text_logprobs(tokenizer: Tokenizer, body: CompletionRequest, part: Delta, offsets: "Offsets") -> dict[str, Any] | None:
    if body.logprobs is None:
        return None
    entries = [_token(tokenizer, item) for item in part.content_logprobs]
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets.of([item.token_id for item in part.content_logprobs]),
    }


class Offsets:
    """Where the tokens of an answer begin in its text, in characters; a token inside of a character where the character does."""

    def __init__(self, tokenizer: Tokenizer, place: int) -> None:
        """`place`: where the answer begins."""
        self._tokenizer, self._place = tokenizer, place
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Of the next tokens."""
        places = []
        for token_id in token_ids:
            raw = b"" if token_id in self._tokenizer.control_token_ids else self._tokenizer.token_bytes(token_id)
            if raw and raw[0] & 0xC0 != 0x80:  # a new character: what was not whole before it stays so
                self._place += len(self._decoder.decode(b"", final=True))
            places.append(self._place)
            self._place += len(self._decoder.decode(raw))
        return places
