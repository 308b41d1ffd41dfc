"""Ollama's door: /api/chat, /api/generate, /api/tags, /api/show and /api/version, over the same jobs as OpenAI's."""

import hashlib
import json
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field, JsonValue, StrictBool, StrictStr

from finback.server.errors import APIError
from finback.server.keys import Key
from finback.server.openai import (
    Calls,
    CompletionJob,
    Job,
    chat_job,
    completion_job,
    form_grammar,
    gathered,
    parsed_arguments,
    written,
)
from finback.server.schemas import Body, ChatRequest, CompletionRequest, ResponseFormat, chat_request
from finback.server.service import Service
from finback.server.turn import Delta

VERSION = "0.12.0"
"""The version of Ollama's API that is spoken here."""
NAMES = {"max_tokens": "num_predict", "response_format": "format", "thinking": "think"}
"""What Ollama calls the fields of OpenAI's."""


class OllamaFunction(BaseModel):
    name: StrictStr
    arguments: dict[str, JsonValue] = {}


class OllamaCall(BaseModel):
    function: OllamaFunction


class OllamaMessage(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr | None = None
    thinking: Any = None
    images: Any = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: StrictStr | None = None


class Asking(Body):
    """What chat and generate share. `options` that change nothing here are ignored."""

    model: StrictStr
    stream: StrictBool | None = None
    think: StrictBool | StrictStr | None = None
    format: Literal["", "json"] | dict[str, JsonValue] | None = None
    options: dict[str, JsonValue] | None = None


class OllamaChatRequest(Asking):
    messages: Annotated[list[OllamaMessage], Field(default_factory=list)]
    tools: list[JsonValue] | None = None


class GenerateRequest(Asking):
    prompt: StrictStr = ""
    suffix: StrictStr | None = None
    system: StrictStr | None = None
    images: Any = None
    raw: StrictBool | None = None


class ShowRequest(Body):
    model: StrictStr | None = None
    name: StrictStr | None = None


class ErrorBody(BaseModel):
    """Ollama's shape of an error."""

    error: str


def error_body(error: APIError) -> dict[str, Any]:
    """Ollama's shape."""
    return {"error": error.message}


def _common(body: Asking, context: int) -> dict[str, Any]:
    """Model and options in OpenAI's words. As Ollama has it, a top_k below 1 is none, and an answer ends where the context does."""
    options = body.options or {}
    fields: dict[str, Any] = {"model": own_name(body.model)}
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "frequency_penalty", "presence_penalty"):
        if options.get(name) is not None:
            fields[name] = options[name]
    fields["stop"] = fields.get("stop") or None
    top_k, length = options.get("top_k"), options.get("num_predict")
    if isinstance(top_k, int) and top_k < 0:
        del fields["top_k"]
    if length is not None and not (isinstance(length, int) and length < 1):  # -1 and -2: as far as there is room
        fields["max_tokens"] = context if isinstance(length, int) and length > context else length
    return fields


def _chat_fields(body: Asking, context: int) -> dict[str, Any]:
    fields = _common(body, context)
    if body.think is not None:
        fields["thinking"] = body.think if isinstance(body.think, bool) else True  # "low", "medium", "high"
    form = _form(body)
    return fields if form is None else {**fields, "response_format": form}


def _form(body: Asking) -> dict[str, Any] | None:
    """`format` as response_format."""
    if body.format == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"schema": body.format}} if isinstance(body.format, dict) else None


def _no_images(images: Any) -> None:
    if images:
        raise APIError(422, "field images: this model reads text only", param="images")


def own_name(model: str) -> str:
    """Ollama's names may end with a tag."""
    return model.removesuffix(":latest")


def chat_of(service: Service, body: OllamaChatRequest, key: Key | None) -> Job:
    """Raises APIError for what cannot be answered."""
    messages = []
    for message in body.messages:
        _no_images(message.images)
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [
                {"function": {"name": c.function.name, "arguments": json.dumps(c.function.arguments, ensure_ascii=False)}}
                for c in message.tool_calls
            ]
        messages.append(turn)
    if messages and messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True
    fields = {**_chat_fields(body, service.context), "messages": messages, "tools": body.tools or None}
    return chat_job(service, chat_request(ChatRequest, fields, NAMES), key, NAMES)


def generate_of(service: Service, body: GenerateRequest, key: Key | None) -> Job | CompletionJob:
    """A chat of one question; with `raw` or a suffix, the text as it stands."""
    _no_images(body.images)
    if body.raw or body.suffix is not None:
        if body.think:
            raise APIError(422, "field think: with raw or suffix the text goes on as it stands, without a thought; leave it out")
        form = _form(body)
        grammar = None if form is None else form_grammar(chat_request(ResponseFormat, form, NAMES))
        fields = {**_common(body, service.context), "prompt": body.prompt, "suffix": body.suffix}
        return completion_job(service, chat_request(CompletionRequest, fields, NAMES), key, grammar, NAMES)
    system = [{"role": "system", "content": body.system}] if body.system else []
    fields = {**_chat_fields(body, service.context), "messages": [*system, {"role": "user", "content": body.prompt}]}
    return chat_job(service, chat_request(ChatRequest, fields, NAMES), key, {**NAMES, "messages": "prompt"})


def lines(service: Service, job: Job | CompletionJob, chat: bool) -> AsyncGenerator[bytes, None]:
    """The answer as lines of JSON; calls of tools come whole, as Ollama sends them."""
    start, calls, reason = time.perf_counter_ns(), Calls(), None

    def step(_: int, part: Delta) -> bytes:
        nonlocal reason
        for call in part.tool_calls:
            calls.delta(call)
        reason = part.finish_reason
        said = part.content or part.reasoning
        return _line(_head(job.model) | _said(chat, part, Calls()) | {"done": False}) if said else b""

    def end() -> bytes:
        called = _line(_head(job.model) | _said(chat, Delta(), calls) | {"done": False}) if calls.calls else b""
        return called + _line(_head(job.model) | _said(chat, Delta(), Calls()) | _end(job, reason, start))

    return written(job.deltas(service), 1, step, end)


async def answer(service: Service, job: Job | CompletionJob, chat: bool) -> dict[str, Any]:
    """The answer in one piece."""
    start = time.perf_counter_ns()
    (whole,) = await gathered(job.deltas(service), 1)
    return _head(job.model) | _said(chat, whole, Calls.of(whole)) | _end(job, whole.finish_reason, start)


def loaded(model: str, chat: bool) -> dict[str, Any]:
    """The answer to a question without words, by which clients load a model."""
    return _head(model) | _said(chat, Delta(), Calls()) | {"done": True, "done_reason": "load"}


def tags(service: Service) -> dict[str, Any]:
    return {"models": [_entry(service, name) for name in service.models]}


def show(service: Service, model: str) -> dict[str, Any]:
    """Raises APIError for a name that is not served."""
    service.thinking_of(model)
    template = service.tokenizer.chat_template or ""
    capabilities = ["completion", "tools"]
    return {
        "modelfile": "", "parameters": "", "template": template, "license": "", "modified_at": _time(service.created),
        "details": _details(service), "capabilities": [*capabilities, "thinking"] if "think" in template else capabilities,
        "model_info": {"general.architecture": _family(service), f"{_family(service)}.context_length": service.context},
    }  # fmt: skip


def _entry(service: Service, name: str) -> dict[str, Any]:
    digest = hashlib.sha256(f"{service.name} {name}".encode()).hexdigest()
    return {
        "name": name, "model": name, "modified_at": _time(service.created), "size": _size(service), "digest": digest,
        "details": _details(service),
    }  # fmt: skip


def _details(service: Service) -> dict[str, Any]:
    family = _family(service)
    return {
        "parent_model": "", "format": "safetensors", "family": family, "families": [family], "parameter_size": "",
        "quantization_level": "",
    }  # fmt: skip


def _family(service: Service) -> str:
    return service.worker.llm.model.config.model_type


def _size(service: Service) -> int:
    return service.worker.llm.model.weight_bytes


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": _time(time.time())}


def _said(chat: bool, part: Delta, calls: Calls) -> dict[str, Any]:
    thinking = {"thinking": part.reasoning} if part.reasoning else {}
    if not chat:
        return {"response": part.content, **thinking}
    message: dict[str, Any] = {"role": "assistant", "content": part.content, **thinking}
    if calls.calls:
        message["tool_calls"] = [
            {"function": {"name": call["function"]["name"], "arguments": parsed_arguments(call)}} for call in calls.calls
        ]
    return {"message": message}


def _end(job: Job | CompletionJob, reason: str | None, start: int) -> dict[str, Any]:
    total = time.perf_counter_ns() - start
    first = min(total, int((job.usage.seconds_to_first or 0) * 1e9))
    return {
        "done": True,
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": job.usage.prompt_tokens,
        "prompt_eval_duration": first,
        "eval_count": job.usage.completion_tokens,
        "eval_duration": total - first,
    }


def _line(data: dict[str, Any]) -> bytes:
    return orjson.dumps(data) + b"\n"
