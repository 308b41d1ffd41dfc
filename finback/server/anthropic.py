"""Anthropic's door: /v1/messages and /v1/messages/count_tokens, over the same jobs as OpenAI's."""

import json
import secrets
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, StrictBool, StrictInt, StrictStr, field_validator

from finback.server.errors import TYPES, APIError
from finback.server.keys import Key
from finback.server.openai import Calls, Job, chat_job, conversation_prompt, gathered, parsed_arguments, written
from finback.server.prompt import tokenized
from finback.server.schemas import Body, ChatRequest, Part, Stop, Temperature, chat_request, is_thought
from finback.server.service import Service
from finback.server.turn import Delta, Usage
from finback.server.wire import event

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING = event({"type": "ping"}, "ping")
ERROR_TYPES = {402: "billing_error", 413: "request_too_large", 500: "api_error"}
"""Where Anthropic's word for a status differs from OpenAI's."""


class Block(Part):
    """A part of a message. Thoughts are taken and dropped, pictures refused."""

    id: StrictStr | None = None
    name: StrictStr | None = None
    input: JsonValue = None
    tool_use_id: StrictStr | None = None
    content: "StrictStr | list[Block] | None" = None


class Turn(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[Block]


class Thought(BaseModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[StrictInt, Field(ge=1)] | None = None


class ToolDefinition(BaseModel):
    """A tool of the client's. Those that Anthropic's own servers run, or its models were taught, have types of their own."""

    type: StrictStr | None = None
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    input_schema: dict[str, JsonValue] = {}

    @field_validator("type")
    @classmethod
    def _is_custom(cls, kind: str | None) -> str | None:
        if kind not in (None, "custom"):
            raise ValueError(
                f"{kind!r} is a tool of Anthropic's, which is not here; leave it out, or describe your own with name and input_schema"
            )
        return kind


class ToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False


class CountRequest(Body):
    """What decides the length of the prompt."""

    model: StrictStr
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: StrictStr | list[Block] | None = None
    thinking: Thought | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None


class MessagesRequest(CountRequest):
    max_tokens: Annotated[StrictInt, Field(ge=1)]
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    stop_sequences: Stop = None
    stream: StrictBool | None = None


class ErrorDetail(BaseModel):
    type: str
    message: str


class ErrorBody(BaseModel):
    """Anthropic's shape of an error."""

    type: Literal["error"]
    error: ErrorDetail


def error_body(error: APIError) -> dict[str, Any]:
    """Anthropic's shape."""
    kind = "not_found_error" if error.code == "model_not_found" else ERROR_TYPES.get(error.status, TYPES[error.status])
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def job_of(service: Service, body: MessagesRequest, key: Key | None) -> Job:
    """Raises APIError for what cannot be answered."""
    return chat_job(service, _translated(body), key)


def count(service: Service, body: CountRequest) -> int:
    """The tokens of a conversation, also of one that is too long to be answered. Raises APIError for what cannot be written."""
    return len(tokenized(service.tokenizer, conversation_prompt(service, _translated(body)).text))


def _translated(body: CountRequest) -> ChatRequest:
    """The same request in OpenAI's words."""
    fields: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    if isinstance(body, MessagesRequest):
        for name in ("max_tokens", "temperature", "top_p", "top_k"):
            fields[name] = getattr(body, name)
        fields["stop"] = body.stop_sequences or None
    if body.thinking is not None:
        fields["thinking"] = body.thinking.model_dump()
    if body.tools:
        fields["tools"] = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
            for t in body.tools
        ]
    choice = body.tool_choice
    if choice is not None:
        if choice.type == "tool" and choice.name is None:
            raise APIError(422, "field tool_choice: type tool needs the field name", param="tool_choice")
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return chat_request(ChatRequest, fields)


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for turn in body.messages:
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages += _turn(turn.role, turn.content)
    if messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True  # what Anthropic's clients mean by a last message of the assistant's
    return messages


def _turn(role: str, blocks: list[Block]) -> list[dict[str, Any]]:
    """One message with results of tools before it, which are messages of their own in OpenAI's words."""
    results = [block for block in blocks if block.type == "tool_result"]
    messages: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": _text(block.content or "")} for block in results
    ]
    calls = [
        {"id": block.id, "function": {"name": block.name or "", "arguments": json.dumps(block.input, ensure_ascii=False)}}
        for block in blocks
        if block.type == "tool_use"
    ]
    others = [block for block in blocks if block.type not in ("tool_result", "tool_use")]
    if calls or others or not results:
        message: dict[str, Any] = {"role": role, "content": _text(others)}
        messages.append({**message, "tool_calls": calls} if calls else message)
    return messages


def _text(content: str | list[Block]) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" and not is_thought(block.type):
            raise APIError(422, f"a message has a block of type {block.type!r}; this model reads text only", param="messages")
    return "".join(block.text or "" for block in content if block.type == "text")


def usage_body(usage: Usage) -> dict[str, int]:
    """Anthropic counts what came from the cache apart."""
    return {
        "input_tokens": usage.miss_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.hit_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _head(model: str, usage: Usage) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": usage_body(usage),
    }  # fmt: skip


async def answer(service: Service, job: Job) -> dict[str, Any]:
    """The answer in one piece."""
    (whole,) = await gathered(job.deltas(service), 1)
    calls = Calls.of(whole)
    content: list[dict[str, Any]] = []
    if whole.reasoning:
        content.append({"type": "thinking", "thinking": whole.reasoning, "signature": ""})
    if whole.content or not calls.calls:
        content.append({"type": "text", "text": whole.content})
    for made in calls.calls:
        content.append({"type": "tool_use", "id": made["id"], "name": made["function"]["name"], "input": parsed_arguments(made)})
    return {**_head(job.model, job.usage), "content": content, **_stop(whole)}


def _stop(last: Delta) -> dict[str, str | None]:
    """Why the answer ended: a stop sequence counts for more than the call of a tool that it cut off."""
    reason = STOP_REASONS[last.finish_reason or "stop"] if last.stop_text is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": last.stop_text}


def events(service: Service, job: Job) -> AsyncGenerator[bytes, None]:
    """The answer as Anthropic's events: blocks that open, grow and close one after the other."""
    kind, index = "", -1  # the block that is open
    calls, last, started = Calls(), Delta(), False

    def opened(new: str, block: dict[str, Any]) -> bytes:
        nonlocal kind, index
        closed, kind, index = shut(), new, index + 1
        return closed + _event("content_block_start", index=index, content_block=block)

    def shut() -> bytes:
        if not kind:
            return b""
        signed = b""
        if kind == "thinking":
            signed = _event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
        return signed + _event("content_block_stop", index=index)

    def grown(**delta: Any) -> bytes:
        return _event("content_block_delta", index=index, delta=delta)

    def step(_: int, part: Delta) -> bytes:
        nonlocal last, started
        out = b"" if started else _event("message_start", message=_head(job.model, job.usage))
        last, started = part, True
        if part.reasoning:
            out += b"" if kind == "thinking" else opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            out += grown(type="thinking_delta", thinking=part.reasoning)
        if part.content:
            out += b"" if kind == "text" else opened("text", {"type": "text", "text": ""})
            out += grown(type="text_delta", text=part.content)
        for call in part.tool_calls:
            named = f"call {call.index}"
            calls.delta(call)
            if kind != named:
                made = calls.calls[call.index]
                out += opened(named, {"type": "tool_use", "id": made["id"], "name": made["function"]["name"], "input": {}})
            out += grown(type="input_json_delta", partial_json=call.arguments)
        return out

    def end() -> bytes:
        out = b"" if index >= 0 else opened("text", {"type": "text", "text": ""})
        out += shut() + _event("message_delta", delta=_stop(last), usage=usage_body(job.usage))
        return out + _event("message_stop")

    return written(job.deltas(service), 1, step, end)


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
