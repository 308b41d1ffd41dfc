"""From messages to the text that the model reads, and its tokens.

Earlier reasoning never enters the prompt, in whatever form clients send it. Whether the model thinks is decided here: by what the
prompt ends with.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finback.config import InputError
from finback.data.reasoning import CLOSE_THOUGHT, opens_thought
from finback.data.tokenizer import END_THINK_TOKEN, FIM_BEGIN_TOKEN, FIM_END_TOKEN, FIM_HOLE_TOKEN, THINK_TOKEN, Tokenizer
from finback.server.errors import APIError
from finback.server.schemas import is_thought

LONG_TEXT = 4096
"""What is longer takes so many milliseconds to be tokenised that it is done in a thread."""


class Prompt(NamedTuple):
    """What the model reads of a conversation, as text."""

    text: str
    thinking: bool
    """Whether the answer starts inside a thought."""
    begun: bool = False
    """Whether the prompt ends in the middle of that thought, with words of a prefix to continue."""


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, thinking: bool | None, tools: Sequence[Mapping[str, Any]] = ()
) -> Prompt:
    """The prompt of a conversation. `thinking` None leaves to the template whether the model thinks.

    A last assistant message with `prefix` true is continued; its `reasoning_content` then is part of what is continued. A prefix that
    opens a thought and does not close it is continued inside the thought, whatever `thinking` says.
    """
    turns = [_turn(message) for message in messages]
    prefix, begun = None, None
    if turns[-1]["role"] == "assistant":
        if "tool_calls" in turns[-1]:  # nothing can be written behind them but their results
            raise APIError(400, "the last message calls tools; add a message with their results", param="messages")
        if not messages[-1].get("prefix"):
            raise APIError(
                400,
                "the last message is the assistant's; add a user's message, or set its field prefix to true",
                param="messages",
            )
        prefix, begun = _prefix(_text(messages[-1].get("content")))
        turns.pop()
        if not turns:
            raise APIError(400, "there is nothing but a prefix to continue; put a user's message before it", param="messages")
    if tools and "tools" not in (tokenizer.chat_template or ""):
        turns = _with_tools(turns, tools)
    if begun is not None:
        thinking = True
    variables = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tools=list(tools) or None, **variables)  # type: ignore[arg-type]
    except InputError as error:
        raise APIError(400, str(error), param="messages") from None
    thinks = opens_thought(text)
    can_think = THINK_TOKEN in tokenizer.backend.get_vocab(with_added_tokens=True) or THINK_TOKEN in (
        tokenizer.chat_template or ""
    )
    if thinks and thinking is False:
        text, thinks = text.rstrip("\n") + "\n" + CLOSE_THOUGHT, False
    elif thinking and not thinks and (can_think or begun is not None):
        text, thinks = f"{text}{THINK_TOKEN}\n", True
    if begun is not None:
        text += begun
    elif prefix is not None:
        if thinks:
            texts = (messages[-1].get(name) for name in ("reasoning_content", "reasoning"))
            reasoning = next((each for each in texts if each and isinstance(each, str)), "")
            text, thinks = text + reasoning + CLOSE_THOUGHT, False
        text += prefix
    return Prompt(text, thinks, begun=bool(begun))


def fim_prompt(tokenizer: Tokenizer, prompt: str, suffix: str) -> str:
    """Fill in the middle, in the order of V3's training: prefix, suffix, middle."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    if not all(token in vocabulary for token in (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN)):
        raise APIError(400, "this model's tokenizer has no tokens to fill in the middle with; leave out suffix", param="suffix")
    return f"{FIM_BEGIN_TOKEN}{prompt}{FIM_HOLE_TOKEN}{suffix}{FIM_END_TOKEN}"


def tokenized(tokenizer: Tokenizer, text: str, *, add_bos: bool = False) -> list[int]:
    """The token ids of a prompt. For long ones the GIL is let go, which only `encode_batch` does."""
    if len(text) <= LONG_TEXT:
        return tokenizer.encode(text, add_bos=add_bos)
    return tokenizer.encode_batch([text], add_bos=add_bos)[0]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates take it: content as one text, no reasoning, tool calls with arguments as JSON text."""
    role = message["role"]
    content = _text(message.get("content"))
    turn: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if role == "assistant":
        turn["content"] = _without_thought(content)
        calls = message.get("tool_calls")
        if calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call["function"]["name"], "arguments": call["function"].get("arguments") or "{}"},
                }
                for call in calls
            ]
            turn["content"] = turn["content"] or None
    return turn


def _without_thought(content: str) -> str:
    """An earlier answer without its thoughts, however they are nested: what stands behind the last closing tag, as the R1 template has
    it too, and before an opening one, whose thought was cut off. A first thought may lack its opening tag: the prompt had it."""
    _, closing, answer = content.rpartition(END_THINK_TOKEN)
    answer, opening, _ = answer.partition(THINK_TOKEN)
    return answer.lstrip() if closing or opening else answer


def _prefix(content: str) -> tuple[str, str | None]:
    """What is to be continued, as (answer, thought): the thought, behind the newline that the layout has, where one was opened at the
    start and not closed; else None."""
    opened = content.lstrip()
    if opened.startswith(THINK_TOKEN) and END_THINK_TOKEN not in opened:
        return "", opened.removeprefix(THINK_TOKEN).removeprefix("\n")
    return _without_thought(content), None


def _text(content: Any) -> str:
    """Content as clients send it: a text, nothing, or a list of parts, of which thoughts are left out."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if is_thought(kind):
            continue
        if kind not in ("text", "input_text", "output_text"):
            raise APIError(422, f"a message has a part of type {kind!r}; this model reads text only", param="messages")
        texts.append(part.get("text") or "")
    return "".join(texts)


def _with_tools(turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """V3's template does not list the tools: they are described in the system message, as its model card does it."""
    described = "\n\n".join(
        f"- `{tool['function']['name']}`:\n```json\n{json.dumps(tool, ensure_ascii=False)}\n```" for tool in tools
    )
    words = f"## Tools\n\n### Function\n\nYou have the following functions available:\n\n{described}"
    if turns and turns[0]["role"] == "system":
        first = turns[0]["content"]
        return [{"role": "system", "content": f"{first}\n\n{words}" if first else words}, *turns[1:]]
    return [{"role": "system", "content": words}, *turns]
