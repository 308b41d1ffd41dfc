"""The API as its official client sees it: answers, thoughts, usage, limits, errors."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from finback.engine.config import SamplingParams
from finback.server.errors import APIError
from finback.server.prompt import chat_prompt
from tests.server.serving import Served, serving

QUESTION: list[Any] = [{"role": "user", "content": "Where does the whale swim?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        assert running.is_idle()


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def run_alone(served: Served, thinking: bool, max_tokens: int, seed: int) -> str:
    """What the engine says without a server."""
    prompt = chat_prompt(served.service.tokenizer, QUESTION, thinking=thinking)
    model = served.llm.model
    from finback.engine.llm import LLM

    llm = LLM(model=model, tokenizer=served.service.tokenizer, max_num_seqs=1)
    return llm.generate(served.service.tokenizer.encode(prompt.text), SamplingParams(max_tokens=max_tokens, seed=seed))[0].text


def test_the_reasoner_thinks_and_the_chat_model_does_not(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="deepseek-reasoner", messages=QUESTION, max_tokens=20, seed=3)
    message = answer.choices[0].message
    assert message.reasoning_content == run_alone(served, True, 20, 3)
    assert message.content == ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens == 20
    answer = client.chat.completions.create(model="deepseek-chat", messages=QUESTION, max_tokens=20, seed=3)
    assert answer.choices[0].message.content == run_alone(served, False, 20, 3)
    assert "reasoning_content" not in answer.choices[0].message.model_dump(exclude_none=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("model", ["deepseek-chat", "deepseek-reasoner", "tiny"])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, model: str) -> None:
    arguments: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 17, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 34
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == whole.choices[index].finish_reason
        for field in ("content", "reasoning_content"):
            joined = "".join(getattr(choice.delta, field, None) or "" for choice in own)
            assert joined == (getattr(whole.choices[index].message, field, None) or "")
    assert whole.choices[0].message != whole.choices[1].message, "answers after the first have seeds of their own"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_with_continuous_usage_stats_every_chunk_tells_the_usage_so_far(served: Served, path: str, n: int) -> None:
    body = {"model": "deepseek-reasoner", "max_tokens": 17, "seed": 5, "n": n, "stream": True, "ignore_eos": True}
    body |= {"messages": QUESTION, "logprobs": True} if "chat" in path else {"prompt": "One day a whale", "logprobs": 0}

    def chunks(**options: bool) -> list[dict[str, Any]]:
        answer = httpx.post(f"{served.url}{path}", json=body | {"stream_options": options}, timeout=60).raise_for_status()
        return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]

    usual = chunks(include_usage=True)
    *parts, last = chunks(include_usage=True, continuous_usage_stats=True)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 17 * n)
    written = reasoned = 0
    for part in parts:
        (choice,) = part["choices"]
        tokens = choice["logprobs"] or {}
        reasoned += len(tokens.get("reasoning_content", []))
        written += len(tokens.get("content", [])) + len(tokens.get("reasoning_content", [])) + len(tokens.get("tokens", []))
        told = part["usage"]
        assert told["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0
        assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
        exact = n == 1 and "role" not in choice.get("delta", {})  # other chunks of the same step may follow
        assert written <= told["completion_tokens"] <= (written if exact else 17 * n)
        assert reasoned <= told["completion_tokens_details"]["reasoning_tokens"] <= (reasoned if exact else 17 * n)
    amounts = [part["usage"]["completion_tokens"] for part in parts]
    assert amounts == sorted(amounts)
    assert len(set(amounts)) > 5, "it grows by steps"
    assert written == 17 * n
    # The second finds in the cache what the first has left there.
    cached = ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "prompt_tokens_details")
    assert [usual[-1]["usage"] | {name: last["usage"][name] for name in cached}] == [last["usage"]]

    assert chunks(continuous_usage_stats=True)[-1]["usage"] == last["usage"], "the one asks for the other"
    assert {json.dumps(part["usage"]) for part in usual[:-1]} == {"null"}
    usual_choices = [part["choices"] for part in usual]
    for options in ({}, {"continuous_usage_stats": False}):
        plain = chunks(**options)
        assert not any("usage" in part for part in plain)
        if n == 1:
            assert [part["choices"] for part in plain] == usual_choices[:-1] == [part["choices"] for part in parts]


def test_usage_tells_hits_in_units_of_64_and_zeros(served: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "鲸鱼" * 40}], "max_tokens": 1}
    served.llm.reset_prefix_cache()
    first, second = (httpx.post(f"{served.url}/chat/completions", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_cache_hit_tokens"] == first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_cache_hit_tokens"] == second["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["prompt_cache_hit_tokens"] % 64 == 0
    for usage in (first, second):
        assert usage["prompt_tokens"] == usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_max_tokens_is_bounded_by_the_context_and_4096_by_default(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service = served.service
    assert [service.max_tokens(asked, 24) for asked in (None, 7, 1000, 1024)] == [1000, 7, 1000, 1000]
    monkeypatch.setattr(served.llm, "max_model_len", 10_000)
    assert [service.max_tokens(asked, 24) for asked in (None, 9000, 10_000)] == [4096, 9000, 9976]
    with pytest.raises(APIError, match=r"above the model's context \(10000\)"):
        service.max_tokens(10_001, 24)


def test_an_answer_ends_where_the_cache_does_whether_or_not_its_length_was_asked_for() -> None:
    with serving(llm={"num_blocks": 4, "max_num_seqs": 1}) as small:
        url, words = f"{small.url}/v1/chat/completions", {"model": "tiny", "messages": QUESTION, "ignore_eos": True}
        for more in ({}, {"max_tokens": 1000}):
            answer = httpx.post(url, json=words | more, timeout=60).raise_for_status().json()
            assert answer["usage"]["total_tokens"] == 4 * 64 + 1
            assert answer["choices"][0]["finish_reason"] == "length"
        long = httpx.post(url, json=words | {"messages": [{"role": "user", "content": "鲸鱼" * 200}]})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "the server's cache holds 256 tokens" in long.json()["error"]["message"]


def test_earlier_reasoning_never_enters_the_prompt(served: Served) -> None:
    def prompt_tokens(**earlier: Any) -> int:
        turn = {"role": "assistant", "content": "North.", **earlier}
        body = {"model": "tiny", "messages": [*QUESTION, turn, *QUESTION], "max_tokens": 1}
        tokens: int = (
            httpx.post(f"{served.url}/v1/chat/completions", json=body).raise_for_status().json()["usage"]["prompt_tokens"]
        )
        return tokens

    plain = prompt_tokens()
    forms: list[dict[str, Any]] = [
        {"reasoning_content": "it is a whale " * 9},
        {"reasoning_content": ""},
        {"reasoning_content": None},
        {"reasoning": "thinking"},
        {"reasoning_content": ["a", {"b": 1}]},
        {"content": "<think>\nit is a whale\n</think>\n\nNorth."},
        {"content": "<think>it is a whale</think>North."},
        {"content": "it is a whale\n</think>\n\nNorth."},
        {"content": [{"type": "text", "text": "North."}]},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "North."}]},
        {"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "North."}], "reasoning_details": [{"a": 1}]},
        *(
            {"content": [{"type": kind, "text": text, "summary": 3}, {"type": "output_text", "text": "North."}]}
            for kind in (
                "thinking",
                "thinking_delta",
                "reasoning.text",
                "reasoning_text",
                "reasoning_content",
                "reasoning.encrypted",
            )
            for text in ("hm", {"value": "hm"}, ["hm"], 3)
        ),
    ]
    assert [prompt_tokens(**form) for form in forms] == [plain] * len(forms)
    assert prompt_tokens(content="<think>\nit is a wh") == prompt_tokens(content=""), "a thought that was cut off"


def test_the_alias_of_the_reasoning_field_is_opt_in(served: Served) -> None:
    body = {"model": "deepseek-reasoner", "messages": QUESTION, "max_tokens": 4, "seed": 1}
    url = f"{served.url}/v1/chat/completions"
    plain = httpx.post(url, json=body).json()["choices"][0]["message"]
    alias = httpx.post(url, json=body | {"reasoning_field": "reasoning"}).json()["choices"][0]["message"]
    assert alias["reasoning"] == plain["reasoning_content"]
    assert "reasoning_content" not in alias


def test_a_budget_closes_the_thought_and_the_model_answers(served: Served) -> None:
    body = {
        "model": "deepseek-reasoner",
        "messages": QUESTION,
        "max_tokens": 40,
        "seed": 1,
        "thinking": {"type": "enabled", "budget_tokens": 8},
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    message, usage = answer["choices"][0]["message"], answer["usage"]
    assert message["reasoning_content"]
    assert message["content"]
    closing = len(served.service.tokenizer.encode("\n</think>\n\n"))
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 8 + closing
    assert usage["completion_tokens"] == 40
    off = body | {"thinking": {"type": "disabled"}}
    assert "reasoning_content" not in httpx.post(f"{served.url}/v1/chat/completions", json=off).json()["choices"][0]["message"]


def test_a_prefix_is_continued(served: Served) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "The whale", "prefix": True, "reasoning_content": "north"}]
    body = {"model": "deepseek-reasoner", "messages": messages, "max_tokens": 3}
    message = httpx.post(f"{served.url}/beta/chat/completions", json=body).raise_for_status().json()["choices"][0]["message"]
    assert message["content"]
    assert "reasoning_content" not in message
    other_form = [messages[0], {**messages[1], "reasoning_content": [{"text": "north"}]}]
    assert httpx.post(f"{served.url}/beta/chat/completions", json=body | {"messages": other_form}).status_code == 200
    refused = httpx.post(
        f"{served.url}/beta/chat/completions", json=body | {"messages": [messages[0], {**messages[1], "prefix": False}]}
    )
    assert refused.status_code == 400
    assert "prefix" in refused.json()["error"]["message"]


def test_a_prefix_forces_and_begins_a_thought(served: Served) -> None:
    """What is written behind it is the thought, and the same as without the prefix where that holds no words."""
    url, body = f"{served.url}/beta/chat/completions", {"max_tokens": 6, "temperature": 0}

    def message(model: str, *prefix: str) -> dict[str, Any]:
        messages = [*QUESTION, *({"role": "assistant", "content": text, "prefix": True} for text in prefix)]
        answer = httpx.post(url, json=body | {"model": model, "messages": messages}).raise_for_status().json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6
        said: dict[str, Any] = answer["choices"][0]["message"]
        return said

    plain = message("deepseek-reasoner")
    assert plain["reasoning_content"]
    for model in ("deepseek-reasoner", "deepseek-chat"):
        assert message(model, "<think>\n") == plain
        begun = message(model, "<think>\nLet me")
        assert begun["content"] == ""
        assert begun["reasoning_content"] != plain["reasoning_content"]


def test_text_and_fill_in_the_middle(served: Served, client: openai.OpenAI) -> None:
    text = client.completions.create(model="tiny", prompt="One day", max_tokens=5, seed=2, logprobs=2, echo=True)
    assert text.choices[0].text.startswith("One day")
    assert text.choices[0].logprobs is not None
    assert len(text.choices[0].logprobs.tokens or []) == 5
    pieces = client.completions.create(model="tiny", prompt="One day", max_tokens=5, seed=2, echo=True, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text
    beta = openai.OpenAI(base_url=f"{served.url}/beta", api_key="none", max_retries=0)
    middle = beta.completions.create(model="deepseek-chat", prompt="One ", suffix=" whale", max_tokens=3)
    assert middle.usage is not None
    assert (
        middle.usage.prompt_tokens
        == len(served.service.tokenizer.encode("<｜fim▁begin｜>One <｜fim▁hole｜> whale<｜fim▁end｜>")) + 1
    )


def test_prefix_filling_in_and_json_need_neither_beta_nor_a_word(served: Served) -> None:
    ask = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    prefix = {"messages": [*QUESTION, {"role": "assistant", "content": "The", "prefix": True}]}
    for path, body in (("chat/completions", prefix), ("completions", {"prompt": "One ", "suffix": " whale"})):
        choices = [
            httpx.post(f"{served.url}/{base}/{path}", json=ask | body).raise_for_status().json()["choices"]
            for base in ("v1", "beta")
        ]
        assert choices[0] == choices[1]
    form = {"messages": QUESTION, "response_format": {"type": "json_object"}, "model": "deepseek-chat"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=ask | form).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_the_places_of_tokens_go_on_over_the_chunks_of_a_text(served: Served, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "One day 鲸", "max_tokens": 12, "seed": 2, "logprobs": 0, "echo": True, "n": 2}
    wholes = client.completions.create(**asked).choices
    pieces = [piece.choices[0] for piece in client.completions.create(**asked, stream=True)]
    for index, whole in enumerate(wholes):
        assert whole.logprobs is not None
        places = whole.logprobs.text_offset or []
        assert places[0] == len("One day 鲸")
        tokens = whole.logprobs.tokens or []
        for place, token in zip(places, tokens, strict=True):
            part_of_a_character, left_out = "\ufffd" in token, token == "<｜end▁of▁sentence｜>"
            assert part_of_a_character or left_out or whole.text[place:].startswith(token)
        own = [piece.logprobs.text_offset or [] for piece in pieces if piece.index == index and piece.logprobs is not None]
        assert [place for some in own for place in some] == places


def test_a_text_that_is_too_long_is_told_by_its_field(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "鲸鱼" * 2000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert answer.json()["error"]["message"].startswith("field prompt makes a prompt of")


def test_log_probabilities_stop_and_json(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="deepseek-reasoner", messages=QUESTION, max_tokens=6, logprobs=True, top_logprobs=3, temperature=0
    )
    logprobs = answer.choices[0].logprobs.model_dump()  # type: ignore[union-attr]
    assert logprobs["content"] == []
    assert len(logprobs["reasoning_content"]) == 6
    entry = logprobs["reasoning_content"][0]
    assert len(entry["top_logprobs"]) == 3
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
    plain = client.chat.completions.create(model="deepseek-chat", messages=QUESTION, max_tokens=12, seed=4)
    text = plain.choices[0].message.content or ""
    stop = text[3:5]
    cut = client.chat.completions.create(model="deepseek-chat", messages=QUESTION, max_tokens=12, seed=4, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    schema = {
        "type": "object",
        "properties": {"north": {"type": "boolean"}},
        "required": ["north"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    made = client.chat.completions.create(model="deepseek-chat", messages=QUESTION, max_tokens=200, seed=4, response_format=form)
    assert isinstance(json.loads(made.choices[0].message.content or "")["north"], bool)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_sea",
        "description": "Where a whale is.",
        "parameters": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}},
            "required": ["deep"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called_whole_and_in_pieces_and_answered(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": "deepseek-chat",
        "messages": QUESTION,
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 400,
        "seed": 1,
        "parallel_tool_calls": False,
    }
    choice = client.chat.completions.create(**arguments).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_sea"
    assert isinstance(json.loads(call.function.arguments)["deep"], bool)
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(**arguments, stream=True)]
    parts = [part for piece in streamed for part in piece.delta.tool_calls or []]
    assert parts[0].id is not None
    assert parts[0].function is not None
    assert parts[0].function.name == "get_sea"
    assert "".join(part.function.arguments or "" for part in parts if part.function) == call.function.arguments
    assert streamed[-1].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "deep"}
    said = choice.message.model_dump(exclude_none=True)
    more = client.chat.completions.create(
        model="deepseek-chat", messages=[*QUESTION, said, result], tools=[TOOL], max_tokens=4, tool_choice="none"
    )
    assert more.choices[0].message.tool_calls is None


CALL = {"id": "1", "type": "function", "function": {"name": "get_sea", "arguments": '{"deep": true}'}}
ERRORS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 400, "there is no model 'gpt-4' here"),
    ({"messages": []}, 422, "field messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 422, "field messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 422, "reads text only"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": "x"}}]}]}, 422, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "鲸鱼" * 2000}]}, 400, "leaves no room for an answer"),
    ({"max_tokens": 0}, 422, "field max_tokens"),
    ({"max_tokens": 5000}, 422, "above the model's context (1024)"),
    ({"temperature": 3}, 422, "field temperature"),
    ({"temperature": "hot"}, 422, "field temperature"),
    ({"top_p": 0}, 422, "field top_p"),
    ({"n": 100}, 422, "field n"),
    ({"stop": ["a"] * 17}, 422, "field stop"),
    ({"stop": ""}, 422, "an empty stop text"),
    ({"logit_bias": {"x": 1}}, 422, "field logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "outside the model's vocabulary"),
    ({"top_logprobs": 2}, 422, "top_logprobs needs logprobs"),
    ({"response_format": {"type": "json_schema"}}, 422, "needs the field json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "impossible"}}}}, 400, "impossible"),
    (
        {
            "tools": [
                TOOL | {"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "impossible"}}}}}
            ]
        },
        400,
        "impossible",
    ),
    (
        {"tools": [TOOL | {"function": {"name": "f", "parameters": {"type": "array"}}}]},
        422,
        'must be a JSON schema of type "object"',
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, 422, "not among the tools"),
    ({"tools": [TOOL, TOOL]}, 422, "two functions with the name"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 422, "surrogates not allowed"),
    ({"stop": "\udfff"}, 422, "surrogates not allowed"),
    ({"seed": 10**30}, 422, "64-bit"),
    ({"top_k": 2**63}, 422, "field top_k"),
    ({"max_tokens": 7, "max_completion_tokens": 5000}, 422, "field max_completion_tokens is 5000"),
    ({"tool_choice": "required"}, 422, "field tool_choice asks for a call, but there are no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "a"}}, "tools": []}, 422, "field tool_choice"),
    ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [CALL]}]}, 400, "the last message calls tools; add a message"),
    ({"messages": [*QUESTION, {"role": "assistant", "prefix": True, "content": "x", "tool_calls": [CALL]}]}, 400, "calls tools"),
]


@pytest.mark.parametrize(("change", "status", "words"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_told_with_its_status(
    served: Served, change: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 2, "stream": stream} | change
    headers = {"content-type": "application/json"}  # httpx itself would refuse what is no Unicode
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=json.dumps(body), headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"}), error
    assert words in error["message"], error


def test_bodies_that_are_no_json_or_too_large(served: Served) -> None:
    url, kind = f"{served.url}/v1/chat/completions", {"content-type": "application/json"}
    assert httpx.post(url, content="{", headers=kind).status_code == 400
    assert httpx.post(url, content=b"\xff\xfe", headers=kind).status_code == 400
    assert httpx.post(url, content="{}").status_code == 400
    for nested in ("[" * 100_000 + "]" * 100_000, "[" * 400 + "]" * 400):
        deep = f'{{"model": "tiny", "messages": [], "tools": [{{"type": "function", "function": {nested}}}]}}'
        assert httpx.post(url, content=deep, headers=kind).status_code in (400, 422)
    large = httpx.post(url, content=b" " * (5 * 2**20), headers=kind)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    chunked = httpx.post(url, content=(b" " * 2**20 for _ in range(6)), headers=kind)
    assert chunked.status_code == 413


NO_JSON: list[tuple[bytes, str]] = [
    (b"[" * 100_000 + b"]" * 100_000, "it is nested too deeply"),
    (b'{"model": "\xff"}', "byte 11 is no utf-8 text (invalid start byte); send UTF-8"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "a number in it has too many digits"),
    (b"{", "Expecting property name"),
]


@pytest.mark.parametrize(("content", "words"), NO_JSON)
def test_a_body_that_is_no_json_is_told_why(served: Served, content: bytes, words: str) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
        answer = httpx.post(f"{served.url}{path}", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert f"the body is not valid JSON: {words}" in str(answer.json()["error"])


KINDS: list[tuple[dict[str, Any], str, str]] = [
    ({"stop": ["a"] * 17}, "stop", "list should have at most 16 items after validation, not 17"),
    ({"stop": ["a", 1]}, "stop.1", "input should be a string, not 1"),
    ({"stop": 3}, "stop", "input should be a string or a list, not 3"),
    ({"thinking": "enabled"}, "thinking", "input should be an object or true or false, not 'enabled'"),
    ({"thinking": {"budget_tokens": 0}}, "thinking.budget_tokens", "input should be greater than or equal to 1, not 0"),
    ({"thinking": {"type": "on"}}, "thinking.type", "input should be 'enabled', 'disabled', 'auto' or 'adaptive', not 'on'"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type", "field required"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0", "input should be an object, not 'x'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "input should be a string or a list, not 3"),
    ({"messages": ["x"]}, "messages.0", "input should be an object, not 'x'"),
    ({"messages": [{}]}, "messages.0.role", "field required"),
    ({"tool_choice": "some"}, "tool_choice", "input should be 'none', 'auto' or 'required' or an object, not 'some'"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "field required"),
    ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "field required"),
]


@pytest.mark.parametrize(("change", "param", "words"), KINDS)
def test_of_a_field_of_several_kinds_the_error_of_the_one_that_is_meant_is_told(
    served: Served, change: dict[str, Any], param: str, words: str
) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"model": "tiny", "messages": QUESTION} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"]) == (422, param, f"field {param}: {words}")


def test_other_names_for_this_machine_and_other_pages_are_refused(served: Served) -> None:
    assert httpx.get(f"{served.url}/v1/models", headers={"host": "evil.example"}).status_code == 403
    for name in ("localhost:1", "LocalHost", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(f"{served.url}/v1/models", headers={"host": name}).status_code == 200
    for name in ("127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", ""):
        assert httpx.get(f"{served.url}/v1/models", headers={"host": name}).status_code == 403
    plain = {"content-type": "text/plain"}  # what a page elsewhere may send unasked
    assert httpx.post(f"{served.url}/v1/chat/completions", content='{"model": "tiny"}', headers=plain).status_code == 400
    answer = httpx.options(
        f"{served.url}/v1/chat/completions", headers={"origin": "https://evil.example", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_elsewhere_can_read_every_error(monkeypatch: pytest.MonkeyPatch) -> None:
    origin, kind = {"origin": "https://chat.example"}, {"content-type": "application/json"}
    with serving(allow_origin=("https://chat.example",), max_request_bytes=1000) as served:
        url = f"{served.url}/v1/chat/completions"

        def status(headers: dict[str, str], content: bytes) -> int:
            answer = httpx.post(url, content=content, headers=origin | kind | headers)
            assert answer.headers["access-control-allow-origin"] == origin["origin"]
            return answer.status_code

        body = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 1}).encode()
        assert status({}, body) == 200
        assert status({}, b" " * 2000) == 413
        assert status({"host": "evil.example"}, body) == 403
        assert status({}, b"{") == 400
        monkeypatch.setattr("finback.server.turn.ReasoningParser.feed", lambda *_: 1 / 0)
        assert status({}, body) == 500
        asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
        assert httpx.options(url, headers=asked).status_code == 200
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{served.url}/health", headers={"origin": "https://evil.example"}).headers
        )
        assert served.is_idle()


def test_facts(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["deepseek-chat", "deepseek-reasoner", "tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{served.url}/v1/models/gpt-4").status_code == 400
    assert httpx.head(served.url).status_code == 200
    assert httpx.get(f"{served.url}/user/balance").json() == {"is_available": True, "balance_infos": []}
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    client.completions.create(model="tiny", prompt="One day", max_tokens=2)
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'finback:kv_cache_usage_perc{model_name="tiny"} 0.0' in metrics
    assert "finback:time_to_first_token_seconds_bucket" in metrics
    tokens = [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("finback:expert_tokens_total{")]
    config = served.llm.model.config
    assert len(tokens) == config.n_routed_experts * len(served.llm.expert_counts) > 0
    assert sum(tokens) > 0
    assert 'finback:expert_load{model_name="tiny",router="0"}' in metrics
    assert httpx.get(f"{served.url}/docs").status_code == 200
    assert httpx.get(served.url).headers["content-security-policy"] == "frame-ancestors 'none'"
    assert httpx.get(f"{served.url}/static/../app.py").status_code == 404
    for path in ("%2e%2e/app.py", "%00", "a" * 5000, "/etc/passwd", "", "vendor"):
        assert httpx.get(f"{served.url}/static/{path}").status_code == 404


def test_a_client_that_leaves_frees_its_blocks(served: Served) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 900, "ignore_eos": True, "n": 8, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body | {"stream": False}, timeout=0.3)
    assert served.is_idle()


def test_prefixes_are_kept_over_a_restart(tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "鲸鱼" * 40}], "max_tokens": 1}
    hits = []
    for _ in range(2):
        with serving(cache_dir=tmp_path / "cache") as served:
            usage = httpx.post(f"{served.url}/v1/chat/completions", json=body).raise_for_status().json()["usage"]
            hits.append(usage["prompt_cache_hit_tokens"])
    assert hits[0] == 0
    assert hits[1] >= 64


def test_kept_prefixes_are_the_owners_alone_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, replace = list[int](), os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append(Path(source).stat().st_mode & 0o777)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    umask = os.umask(0)
    try:
        with serving(cache_dir=tmp_path) as served:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "鲸鱼" * 40}], "max_tokens": 1}
            httpx.post(f"{served.url}/v1/chat/completions", json=body).raise_for_status()
    finally:
        os.umask(umask)
    assert seen == [0o600]
    assert (tmp_path / "prefixes.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["truncated", "another model's", "no such file at all"])
def test_prefixes_that_cannot_be_used_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    file, aside = tmp_path / "prefixes.safetensors", tmp_path / "prefixes.safetensors.aside"
    with serving(cache_dir=tmp_path) as served:
        httpx.post(
            f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "鲸鱼" * 80, "max_tokens": 1}
        ).raise_for_status()
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-9], "no such file at all": b"nonsense"}.get(kind, content))
    with serving(cache_dir=tmp_path, llm={"block_size": 32} if kind == "another model's" else None) as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
    (line,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert "is set aside as prefixes.safetensors.aside" in line
    assert ("another model's" in line) == (kind == "another model's")
    assert aside.exists()
    assert not file.exists(), "an empty cache leaves no file that the next server would warn of"


def test_slow_answers_are_kept_alive_and_too_many_are_refused() -> None:
    with serving(keep_alive_seconds=0.001, max_num_seqs=1, max_waiting=0) as served:
        url = f"{served.url}/v1/chat/completions"
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 300, "ignore_eos": True}
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            refused = httpx.post(url, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert "retry-after" in refused.headers
            assert ": keep-alive" in list(lines)
        whole = httpx.post(url, json=body, timeout=60)
        assert whole.text.startswith("\n")
        assert whole.json()["usage"]["completion_tokens"] == 300
