"""Two models for one answer: a planner thinks, a writer writes what follows from the thought.

Each half is a directory of ours or an OpenAI-style endpoint. The plan is the planner's thought, or its whole answer where it has none.
A writer whose template opens a thought continues behind the plan as if it had thought it; any other reads it behind the question.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from finback.config import InputError
from finback.data.chat import Message
from finback.data.reasoning import CLOSE_THOUGHT, ReasoningParser, opens_thought
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM

PLAN_WORDS = "\n\nFollow this plan, which was made for you, and write the answer:\n"


class Said(NamedTuple):
    """What came at one step. `tokens` counts tokens of a directory's model and parts of an endpoint's reply."""

    reasoning: str
    content: str
    tokens: int
    finish_reason: str | None


@runtime_checkable
class Speaker(Protocol):
    """A model that answers messages; `plan`, if given, stands in the place of its own thought. Leaving early aborts the request."""

    def say(self, messages: Sequence[Message], params: SamplingParams, plan: str | None) -> Generator[Said, None, None]: ...


@dataclass(frozen=True)
class Pair:
    """The two halves."""

    planner: Speaker
    writer: Speaker


class LocalSpeaker:
    """A model in a Hugging Face directory. The oldest turns leave the prompt where the context is full."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = load_tokenizer(directory)
        if self.tokenizer.chat_template is None:
            raise InputError(f"{directory} has no chat template, so it can neither plan nor write; name a model to chat with")
        self.llm = LLM(directory, tokenizer=self.tokenizer, max_num_seqs=1)

    def say(self, messages: Sequence[Message], params: SamplingParams, plan: str | None) -> Generator[Said, None, None]:
        opened, ids = self._prompt(list(messages), params, plan)
        room = self.llm.max_model_len - len(ids)
        if params.max_tokens is not None:
            params = replace(params, max_tokens=min(params.max_tokens, room))
        parser = ReasoningParser(starts_in_thought=opened, tools=False)
        for part in self.llm.stream(ids, params):
            increment = parser.feed(part.text)
            yield Said(increment.reasoning, increment.content, len(part.token_ids), part.finish_reason)
        rest = parser.finish()
        if rest.reasoning or rest.content:
            yield Said(rest.reasoning, rest.content, 0, None)

    def _prompt(self, messages: list[Message], params: SamplingParams, plan: str | None) -> tuple[bool, list[int]]:
        """Whether the answer begins within a thought, and the tokens to continue."""
        limit = self.llm.max_model_len
        needed = min(params.max_tokens or limit, max(1, limit // 4))
        while True:
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            opened = opens_thought(prompt)
            if plan is not None and opened:
                prompt, opened = f"{prompt}{plan.strip()}{CLOSE_THOUGHT}", False
            elif plan is not None:
                prompt = self.tokenizer.apply_chat_template(with_plan(messages, plan), add_generation_prompt=True)
            ids = self.tokenizer.encode(prompt)
            if len(ids) + needed <= limit:
                return opened, ids
            oldest = 1 if messages[0]["role"] == "system" else 0
            if len(messages) - oldest < 3:
                what = "message and plan have" if plan is not None else "the message has"
                raise InputError(
                    f"{what} {len(ids)} tokens and an answer needs {needed} more, the context is {limit}; shorten the message"
                )
            del messages[oldest : oldest + 2]


class EndpointSpeaker:
    """A model behind BASE_URL/chat/completions, streamed. What goes wrong there is an InputError that names the address."""

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, timeout_seconds: float = 120.0) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout_seconds = model, timeout_seconds
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    def say(self, messages: Sequence[Message], params: SamplingParams, plan: str | None) -> Generator[Said, None, None]:
        sent = list(messages) if plan is None else with_plan(messages, plan)
        body: dict[str, Any] = {"model": self.model, "messages": sent, "stream": True}
        body |= {"temperature": params.temperature, "top_p": params.top_p}
        body |= {name: value for name in ("max_tokens", "seed") if (value := getattr(params, name)) is not None}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        parser = ReasoningParser(starts_in_thought=False, tools=False)  # for servers that leave the tags in the content
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                for delta, finish_reason in self._deltas(response):
                    increment = parser.feed(delta.get("content") or "")
                    reasoning = (delta.get("reasoning_content") or "") + increment.reasoning
                    yield Said(reasoning, increment.content, 1, finish_reason)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(300).decode(errors="replace")
            raise InputError(f"{self.url} refused with HTTP {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{self.url} cannot be reached or broke off ({error}); start it, or ask again") from None
        rest = parser.finish()
        if rest.reasoning or rest.content:
            yield Said(rest.reasoning, rest.content, 0, None)

    def _deltas(self, lines: Iterator[bytes]) -> Iterator[tuple[dict[str, Any], str | None]]:
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            try:
                choices = json.loads(line[5:])["choices"]
                if choices:
                    yield dict(choices[0]["delta"]), choices[0].get("finish_reason")
            except (ValueError, KeyError, TypeError, IndexError):
                raise InputError(f"{self.url} sent a part that is no chat completion: {line[:100]!r}") from None


def with_plan(messages: Sequence[Message], plan: str) -> list[Message]:
    """The messages with the plan behind the last one's text."""
    last = dict(messages[-1])
    last["content"] = f"{last['content']}{PLAN_WORDS}{plan.strip()}"
    return [*messages[:-1], last]


def open_speaker(place: str, *, model: str, api_key_env: str) -> Speaker:
    """The speaker at a URL or in a directory; the key is the value of the environment variable `api_key_env`, if one is named."""
    if not place.startswith(("http://", "https://")):
        return LocalSpeaker(Path(place))
    key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not key:
        raise InputError(f"there is no environment variable {api_key_env}; set it to the key of {place}")
    return EndpointSpeaker(place, model, api_key=key)


def plan_and_write_steps(pair: Pair, messages: Sequence[Message], params: SamplingParams) -> Generator[Said, None, None]:
    """The plan as reasoning and then the writer's answer as content, as they come.

    The planner is left as soon as its thought has ended. InputError if it says nothing.
    """
    thought, answered = "", ""
    planning = pair.planner.say(messages, params, None)
    try:
        for said in planning:
            thought += said.reasoning
            answered += said.content
            if thought.strip() and said.content.strip():
                if said.reasoning:
                    yield Said(said.reasoning, "", said.tokens, None)
                break
            yield Said(said.reasoning or said.content, "", said.tokens, None)
    finally:
        planning.close()
    plan = thought if thought.strip() else answered
    if not plan.strip():
        raise InputError("the planner said nothing, so there is no plan to write from; ask again, or name another --plan-with")
    writing = pair.writer.say(messages, params, plan.strip())
    try:
        for said in writing:
            yield Said("", said.content, said.tokens, said.finish_reason)  # a thought of the writer's own is its own affair
    finally:
        writing.close()


def plan_and_write(pair: Pair, question: str, params: SamplingParams) -> tuple[str, str]:
    """The plan and the answer to one question, at once."""
    steps = list(plan_and_write_steps(pair, [{"role": "user", "content": question}], params))
    return "".join(said.reasoning for said in steps), "".join(said.content for said in steps)
