"""The published V3 and R1 chat templates, and rendering in a sandbox as `transformers` does it.

Layout (bars are U+FF5C, the low line is U+2581):

    <｜begin▁of▁sentence｜>{system}<｜User｜>{question}<｜Assistant｜>{answer}<｜end▁of▁sentence｜><｜User｜>...

The templates are kept byte for byte as published, with their known oddities:

- V3 closes a turn of tool calls (`<｜tool▁calls▁end｜>` and the end-of-sentence token) only inside the branch of the
  second and later calls: a turn with a single call stays unclosed, a turn with three calls closes twice. R1 closes
  each turn once.
- In both, "first call" and "first output" are remembered over the whole conversation: a later turn of calls starts
  with a newline where the opening tags belong.
- Tool outputs are followed by the answer directly, without `<｜Assistant｜>`, and after them there is no generation
  prompt.
- R1 drops what stands up to the last `</think>` of an assistant turn, unless the turn calls a tool or answers its
  output. Its generation prompt ends with `<think>` and a newline.
- V3 takes an assistant turn whose content is null for a tool call, R1 one that has the key `tool_calls`. (Version 5.23
  of `transformers` drops keys that are null before it renders, and so fails on such turns; the template itself does
  not.)
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finback.config import InputError

Message = Mapping[str, Any]


def published_template(name: str) -> str:
    """The text of a published chat template; `name` is "deepseek_v3" or "deepseek_r1"."""
    file = resources.files("finback.data") / "templates" / f"{name}.jinja"
    if not file.is_file():
        raise InputError(f"there is no published chat template {name!r}; choose 'deepseek_v3' or 'deepseek_r1'")
    return file.read_bytes().decode()


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Render `messages` with a Jinja chat template, byte for byte as `transformers.apply_chat_template` does.

    A message is a mapping with `role`, `content` (None in a turn that only calls tools) and for tools `tool_calls`.
    Raises InputError if the template is not valid Jinja, reaches outside of the sandbox, or meets a message that lacks
    what it needs.
    """
    try:
        return _compile(template).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            **variables,
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError) as error:
        raise InputError(
            f"the chat template cannot render these messages: {error}; each message needs a role and a content, "
            "and the arguments of a tool call are JSON text"
        ) from None


@cache
def _compile(template: str) -> jinja2.Template:
    # The same environment as in transformers, or trimmed white space would differ.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
