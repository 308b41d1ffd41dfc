"""What an answer's form may be asked to be. No torch and no grammar engine: `SamplingParams` refers to it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finback.config import InputError, nearest

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
MAX_TOOLS = 128


@dataclass(frozen=True)
class Grammar:
    """A form that the answer must have: make one with `json_object`, `json_schema`, `regex`, `lark` or `tool_calls`.

    Only what needs no grammar engine is checked here; `finback.engine.grammar` finds the rest when the request is added.
    """

    kind: Literal["json_schema", "regex", "lark", "tools"]
    source: str
    """The schema as JSON, the pattern, the Lark text, or the tools' (name, schema) pairs as JSON."""
    calls: Literal["auto", "required"] = "required"
    """Whether an answer without a tool call is allowed; with "auto", text may stand before the calls, or instead of them."""
    parallel: bool = True
    """Whether there may be more than one tool call."""
    after_think: bool = False
    """The form begins after `</think>` (and up to two newlines); what comes before is free."""

    @classmethod
    def json_object(cls, *, after_think: bool = False) -> "Grammar":
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}', after_think=after_think)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | bool, *, after_think: bool = False) -> "Grammar":
        """JSON that a schema (a mapping, or its JSON text) accepts; properties come in the schema's order."""
        return cls("json_schema", _schema_text("the JSON schema", schema), after_think=after_think)

    @classmethod
    def regex(cls, pattern: str, *, after_think: bool = False) -> "Grammar":
        """Text that a regular expression matches as a whole; look-around and back references are not supported."""
        return cls("regex", _text("regex", pattern), after_think=after_think)

    @classmethod
    def lark(cls, text: str, *, after_think: bool = False) -> "Grammar":
        """Text that a context-free grammar in Lark's notation derives from its rule `start`."""
        return cls("lark", _text("grammar", text), after_think=after_think)

    @classmethod
    def tool_calls(
        cls,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any] = "auto",
        *,
        parallel: bool = True,
        after_think: bool = False,
    ) -> "Grammar":
        """Calls of OpenAI-style `tools` in DeepSeek's template. `tool_choice` is "auto", "required", a tool's name, or
        {"type": "function", "function": {"name": ...}}, which allow calls, ask for one or more, or for those of one tool."""
        if not isinstance(tools, Sequence) or isinstance(tools, str) or not 1 <= len(tools) <= MAX_TOOLS:
            raise InputError(f"field tools must be a list of 1 to {MAX_TOOLS} tools")
        schemas: dict[str, str] = {}
        for i, tool in enumerate(tools):
            name, schema = _tool(i, tool)
            if name in schemas:
                raise InputError(f"field tools has two functions with the name {name!r}; give each a name of its own")
            schemas[name] = schema
        if tool_choice in ("auto", "required"):
            calls: Literal["auto", "required"] = "auto" if tool_choice == "auto" else "required"
            return cls("tools", json.dumps(list(schemas.items())), calls, parallel, after_think)
        function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else {"name": tool_choice}
        chosen = function.get("name") if isinstance(function, Mapping) else None
        if chosen not in schemas:
            hint = nearest(str(chosen), list(schemas))
            raise InputError(f"field tool_choice names the function {chosen!r}, which is not among the tools{hint}")
        return cls("tools", json.dumps([(chosen, schemas[chosen])]), "required", parallel, after_think)


def _tool(i: int, tool: Any) -> tuple[str, str]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise InputError(f'field tools[{i}] is {tool!r}, it must be {{"type": "function", "function": {{"name": ...}}}}')
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise InputError(f"field tools[{i}].function.name is {name!r}, it must be 1 to 64 letters, digits, low lines and dashes")
    where = f"the parameters of the function {name!r}"
    text = _schema_text(where, function.get("parameters") or _NO_ARGUMENTS)
    schema = json.loads(text)
    if not isinstance(schema, dict) or schema.setdefault("type", "object") != "object":
        raise InputError(f'{where} must be a JSON schema of type "object"')
    return name, json.dumps(schema)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"field {what} is {value!r}, it must be a text that is not empty")
    return value


def _schema_text(what: str, schema: Any) -> str:
    """The schema as JSON text; InputError if it is none."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping | bool):
            raise InputError(f"{what} is a JSON {type(value).__name__}, it must be an object")
        return json.dumps(value, allow_nan=False)
    except json.JSONDecodeError as error:
        raise InputError(f"{what} is not valid JSON: {error}") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} cannot be written as JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply; make it flatter") from None
