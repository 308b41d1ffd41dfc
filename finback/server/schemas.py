"""What clients may send, as pydantic models: outside input is rejected here or nowhere. Names and ranges are DeepSeek's and OpenAI's.

Fields that we do not know are ignored, as the hosted services do: clients send many that change nothing here.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from finback.server.errors import APIError

Kind = TypeVar("Kind", bound=BaseModel)

Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Body(BaseModel):
    """A whole request. What no text of ours could hold, or hand on, goes no further: halves of surrogate pairs, numbers beyond 64 bits,
    lists a few hundred deep."""

    @model_validator(mode="before")
    @classmethod
    def _can_be_written(cls, data: Any) -> Any:
        try:
            if isinstance(data, dict):
                orjson.dumps(data)
        except orjson.JSONEncodeError as error:
            raise ValueError(f"the body cannot be used: {error}") from None
        return data


def is_thought(kind: Any) -> bool:
    """Whether parts of this type hold an earlier thought: thinking, redacted_thinking, reasoning, reasoning.text, ..."""
    return isinstance(kind, str) and kind.startswith(("thinking", "redacted_thinking", "reasoning"))


class Part(BaseModel):
    """A part of a message's content; only texts can be read. Of a thought nothing but its type is looked at."""

    type: StrictStr
    text: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_thought(cls, data: Any) -> Any:
        return {"type": data["type"]} if isinstance(data, dict) and is_thought(data.get("type")) else data


class FunctionCall(BaseModel):
    name: StrictStr
    arguments: StrictStr | None = None


class ToolCall(BaseModel):
    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """`reasoning_content`, and `reasoning` for it, are taken in any form and dropped, but in a prefix to continue."""

    role: Role
    content: StrictStr | list[Part] | None = None
    name: StrictStr | None = None
    prefix: StrictBool | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None


class StreamOptions(BaseModel):
    """With `continuous_usage_stats`, vLLM's name, every chunk has the usage so far and not only the last one."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False

    @property
    def with_usage(self) -> bool:
        return self.include_usage or self.continuous_usage_stats


class JSONSchema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    name: StrictStr = "answer"
    schema_: dict[str, JsonValue] | bool = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs the field json_schema")
        return self


class Thinking(BaseModel):
    """Whether the model thinks, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "auto", "adaptive"] = "enabled"
    budget_tokens: Annotated[StrictInt, Field(ge=1)] | None = None


class Function(BaseModel):
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: StrictStr


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class Sampling(Body):
    """What chat and plain completions share."""

    model: StrictStr
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=2**63 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[StrictStr, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = None
    ignore_eos: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: Stop) -> Stop:
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise ValueError("an empty stop text would end every answer at once")
        return stop


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    thinking: Thinking | StrictBool | None = None
    thinking_budget: Annotated[StrictInt, Field(ge=1)] | None = None
    reasoning_field: Literal["reasoning_content", "reasoning"] = "reasoning_content"

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self


class CompletionRequest(Sampling):
    prompt: StrictStr
    suffix: StrictStr | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error has this shape."""

    error: ErrorDetail


_SHAPES = {
    "model_type": "an object", "model_attributes_type": "an object", "dict_type": "an object", "list_type": "a list",
    "string_type": "a string", "bool_type": "true or false", "literal_error": "",
}  # fmt: skip
"""Errors of pydantic's that say no more than that the input is of another kind; "" where its own words say of which."""


def told(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str]:
    """What pydantic says of `body`, as (field, sentence) of the first field that is wrong."""
    meant = _meant([{**error, "loc": tuple(error["loc"])} for error in errors], body)
    first = meant[0]
    place = ".".join(map(str, first["loc"]))
    place = place if len(place) < 100 else f"{place[:100]}..."
    words = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in _SHAPES:
        kinds = dict.fromkeys(_SHAPES[error["type"]] or str(error["msg"]).removeprefix("Input should be ") for error in meant)
        words = f"input should be {' or '.join(kinds)}"
    value = first.get("input")
    ours = first["type"] == "value_error"  # says what is wrong with the value by itself
    shown = f", not {value!r}" if isinstance(value, str | int | float | bool) and len(str(value)) < 60 and not ours else ""
    return place, f"field {place}: {words[0].lower() + words[1:]}{shown}" if place else words


def _meant(errors: list[dict[str, Any]], body: Any) -> list[dict[str, Any]]:
    """The first error. Where a field may be of several kinds, pydantic tells of each, with its name in the place: of these the first
    error of the kind that the input is of; if it is of none, one for each kind. The names are left out."""
    at = _kind_in(errors[0], body)
    if at is None:
        return errors[:1]
    place = errors[0]["loc"][:at]
    kinds: dict[Any, list[dict[str, Any]]] = {}
    for error in errors:
        loc = error["loc"]
        if loc[:at] == place and len(loc) > at:
            kinds.setdefault(loc[at], []).append({**error, "loc": place + loc[at + 1 :]})
    for of_kind in kinds.values():
        if of_kind[0]["loc"] != place or of_kind[0]["type"] not in _SHAPES:
            return _meant(of_kind, body)
    return [of_kind[0] for of_kind in kinds.values()]


def _kind_in(error: Mapping[str, Any], body: Any) -> int | None:
    """Where in an error's place the name of a kind stands: the first part that leads nowhere in the body and is no missing field."""
    loc, value = error["loc"], body
    for at, part in enumerate(loc):
        if (isinstance(value, Mapping) and part in value) or (isinstance(value, list) and part in range(len(value))):
            value = value[part]
        else:
            return None if at == len(loc) - 1 and error["type"] == "missing" else at
    return None


def chat_request(kind: type[Kind], fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Kind:
    """What another door has translated, checked once more; 422 names the field, as the door calls it where `names` has it."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        place, words = told(error.errors(), fields)
        inner = place.split(".")
        named = ".".join((names or {}).get(part, part) for part in inner)
        raise APIError(422, words.replace(f"field {place}", f"field {named}", 1), param=named or None) from None
