"""Anthropic's and Ollama's doors as their official clients see them."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from finback.server import ollama as ollama_door
from finback.server.openai import parsed_arguments
from tests.server.serving import Served, serving

QUESTION: list[Any] = [{"role": "user", "content": "Where does the whale swim?"}]
PARAMETERS = {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"], "additionalProperties": False}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        assert running.is_idle()


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def llama(served: Served) -> Iterator[ollama.Client]:
    client = ollama.Client(host=served.url)
    yield client
    client._client.close()


GREEDY = {"temperature": 0}  # which the client's own arguments no longer have


def openai_message(served: Served, **fields: Any) -> Any:
    """What the first door says to the same."""
    body = {"messages": QUESTION, **fields}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()["choices"][0]


def test_a_message_has_a_block_for_the_thought_and_one_for_the_answer(served: Served, claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": "deepseek-reasoner",
        "messages": QUESTION,
        "max_tokens": 40,
        "thinking": {"type": "enabled", "budget_tokens": 8},
        "extra_body": GREEDY,
    }
    message = claude.messages.create(**asked)
    expected = openai_message(served, model="deepseek-reasoner", max_tokens=40, thinking=asked["thinking"], **GREEDY)["message"]
    thought, text = message.content
    assert thought.type == "thinking"
    assert text.type == "text"
    assert (thought.thinking, text.text) == (expected["reasoning_content"], expected["content"])
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 40
    count = claude.messages.count_tokens(model="deepseek-reasoner", messages=QUESTION, thinking=asked["thinking"])
    assert count.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"signature"}) for block in final.content] == [
        block.model_dump(exclude={"signature"}) for block in message.content
    ]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert final.usage.output_tokens == 40


def test_messages_with_tools(served: Served, claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {
        "model": "deepseek-chat",
        "messages": QUESTION,
        "max_tokens": 400,
        "extra_body": GREEDY,
        "tools": [{"name": "get_sea", "description": "Where a whale is.", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "get_sea", "disable_parallel_tool_use": True},
    }
    message = claude.messages.create(**asked)
    call = message.content[-1]
    assert call.type == "tool_use"
    assert message.stop_reason == "tool_use"
    assert call.name == "get_sea"
    assert isinstance(call.input["deep"], bool)  # type: ignore[index]
    with claude.messages.stream(**asked) as stream:
        assert stream.get_final_message().content[-1].input == call.input  # type: ignore[union-attr]
    thought = {"type": "thinking", "thinking": "hm " * 50, "signature": ""}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "yes"}]}
    turns: list[Any] = [
        *QUESTION,
        {"role": "assistant", "content": [thought, call.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    forms: list[Any] = [
        [],
        [thought],
        [{"type": "thinking", "text": {"a": 1}, "id": 3}],
        [{"type": "reasoning.text", "text": "hm"}],
    ]
    counts = {
        claude.messages.count_tokens(
            model="deepseek-chat", messages=[turns[0], {"role": "assistant", "content": [*form, call.model_dump()]}, turns[2]]
        ).input_tokens
        for form in forms
    }
    assert len(counts) == 1, "thoughts never enter the prompt"
    assert claude.messages.create(model="deepseek-chat", messages=turns, max_tokens=2).usage.output_tokens == 2


def test_messages_may_end_with_a_prefix_and_begin_with_a_system_text(served: Served, claude: anthropic.Anthropic) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "The whale"}]
    message = claude.messages.create(
        model="tiny", system=[{"type": "text", "text": "Be short."}], messages=turns, max_tokens=5, extra_body=GREEDY
    )
    system = {"role": "system", "content": "Be short."}
    prefix = {"role": "assistant", "content": "The whale", "prefix": True}
    expected = openai_message(served, model="tiny", messages=[system, *QUESTION, prefix], max_tokens=5, temperature=0)
    assert message.content[0].text == expected["message"]["content"]  # type: ignore[union-attr]


def test_a_stop_sequence_is_named(served: Served, claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "deepseek-chat", "messages": QUESTION, "max_tokens": 30, "extra_body": GREEDY}
    plain = claude.messages.create(**asked)
    assert (plain.stop_reason, plain.stop_sequence) == ("max_tokens", None)
    text = plain.content[0].text  # type: ignore[union-attr]
    stop = text[4:7]
    stops = ["never written", stop]
    whole = claude.messages.create(**asked, stop_sequences=stops)
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", stop)
    assert whole.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]
    with claude.messages.stream(**asked, stop_sequences=stops) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    in_thought = claude.messages.create(**asked | {"model": "deepseek-reasoner"})
    thought = in_thought.content[0].thinking  # type: ignore[union-attr]
    cut = claude.messages.create(**asked | {"model": "deepseek-reasoner"}, stop_sequences=[thought[2:5]])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", thought[2:5])


def test_tokens_are_counted_of_what_is_too_long_and_under_load(claude: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": "鲸" * 2000}]
    assert claude.messages.count_tokens(model="tiny", messages=long).input_tokens > 1024
    with serving(max_num_seqs=1, max_waiting=0) as full:
        full.slow_down()
        body = {"model": "tiny", "messages": QUESTION}
        endless = body | {"max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{full.url}/v1/chat/completions", json=endless, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert httpx.post(f"{full.url}/v1/messages", json=body | {"max_tokens": 1}).status_code == 503
            assert httpx.post(f"{full.url}/v1/messages/count_tokens", json=body).status_code == 200


ARGUMENTS = [
    '{"a": 18446744073709551616}',
    '{"a": "\\ud800"}',
    '{"a": 1e999}',
    f'{{"a": {"9" * 5000}}}',
    '{"a": ' + "[" * 9999,
    "{",
]


@pytest.mark.parametrize("text", ARGUMENTS)
def test_arguments_that_no_answer_can_hold_come_as_their_text(text: str) -> None:
    call = {"function": {"name": "get_sea", "arguments": text}}
    assert parsed_arguments(call) == {"arguments": text}
    json.dumps(parsed_arguments(call), ensure_ascii=False, allow_nan=False).encode()


def test_arguments_are_an_object() -> None:
    assert parsed_arguments({"function": {"arguments": '{"a": [1, "鲸"]}'}}) == {"a": [1, "鲸"]}
    assert parsed_arguments({"function": {"arguments": "3"}}) == {"arguments": 3}


def test_messages_that_ask_for_what_is_not_there_are_refused(served: Served, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.UnprocessableEntityError, match="there are no tools"):
        claude.messages.create(model="tiny", messages=QUESTION, max_tokens=1, tool_choice={"type": "any"})
    with pytest.raises(anthropic.UnprocessableEntityError, match="field top_k"):
        claude.messages.create(model="tiny", messages=QUESTION, max_tokens=1, extra_body={"top_k": 2**63})
    claude.messages.create(model="tiny", messages=QUESTION, max_tokens=1, extra_body={"top_k": 2**63 - 1})
    call: Any = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "get_sea", "input": {}}]}
    with pytest.raises(anthropic.BadRequestError, match="the last message calls tools"):
        claude.messages.create(model="tiny", messages=[*QUESTION, call], max_tokens=1)


def test_tools_of_anthropics_own_are_refused(served: Served) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1}
    own = {"name": "get_sea", "input_schema": PARAMETERS}
    for kind in ("web_search_20250305", "bash_20250124", "mcp_toolset"):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            tools = [own, {"type": kind} | ({} if kind == "mcp_toolset" else {"name": "bash"})]
            answer = httpx.post(f"{served.url}{path}", json=body | {"tools": tools})
            assert answer.status_code == 422
            told = answer.json()["error"]["message"]
            assert told.startswith(f"field tools.1.type: '{kind}' is a tool of Anthropic's, which is not here; leave it out")
            assert not told.endswith(f"not '{kind}'")
    for kind in ("custom", None):
        assert httpx.post(f"{served.url}/v1/messages", json=body | {"tools": [own | {"type": kind}]}).status_code == 200


def test_errors_of_the_messages_are_in_their_shape(served: Served, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude'") as unknown:
        claude.messages.create(model="claude", messages=QUESTION, max_tokens=1)
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]
    with pytest.raises(anthropic.BadRequestError, match="leaves no room") as told:
        claude.messages.create(model="tiny", messages=[{"role": "user", "content": "鲸" * 2000}], max_tokens=1)
    assert told.value.body["type"] == "error"  # type: ignore[index, call-overload]
    assert told.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index, call-overload]
    image: Any = {"type": "image", "source": {"type": "url", "url": "x"}}
    with pytest.raises(anthropic.UnprocessableEntityError, match="reads text only"):
        claude.messages.create(model="tiny", messages=[{"role": "user", "content": [image]}], max_tokens=1)
    assert httpx.post(f"{served.url}/v1/messages", json={"model": "tiny"}).json()["type"] == "error"


def test_ollama_chats_whole_and_in_pieces(served: Served, llama: ollama.Client) -> None:
    options = {"num_predict": 30, "temperature": 0}
    whole = llama.chat(model="tiny:latest", messages=QUESTION, think=True, options=options)
    expected = openai_message(served, model="tiny", max_tokens=30, temperature=0, thinking=True)["message"]
    assert whole.message.thinking == expected["reasoning_content"]
    assert (whole.done_reason, whole.eval_count) == ("length", 30)
    parts = list(llama.chat(model="tiny", messages=QUESTION, think=True, options=options, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == expected["reasoning_content"]
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count
    plain = llama.chat(model="tiny", messages=QUESTION, think=False, options=options)
    assert (
        plain.message.content == openai_message(served, model="deepseek-chat", max_tokens=30, temperature=0)["message"]["content"]
    )


def test_a_connection_that_is_kept_open_disturbs_no_client() -> None:
    """With something sent for each moment without a token, each client sees the answer and nothing else."""
    with serving(keep_alive_seconds=0.0005) as slow:
        options = {"num_predict": 20, "temperature": 0}
        llama = ollama.Client(host=slow.url)
        whole = llama.chat(model="tiny", messages=QUESTION, think=False, options=options)
        parts = list(llama.chat(model="tiny", messages=QUESTION, think=False, options=options, stream=True))
        text = "".join(part.message.content or "" for part in parts)
        assert text == whole.message.content
        llama._client.close()
        asked: dict[str, Any] = {"model": "deepseek-chat", "messages": QUESTION, "max_tokens": 20}
        with anthropic.Anthropic(base_url=slow.url, api_key="none", max_retries=0) as claude:
            assert claude.messages.create(**asked, extra_body=GREEDY).content[0].text == text  # type: ignore[union-attr]
            with claude.messages.stream(**asked, extra_body=GREEDY) as stream:
                assert stream.get_final_text() == text
        with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
            assert client.chat.completions.create(**asked, temperature=0).choices[0].message.content == text
            pieces = client.chat.completions.create(**asked, temperature=0, stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
            assert ": keep-alive" in httpx.post(f"{slow.url}/v1/chat/completions", json=asked | {"stream": True}).text
        assert slow.is_idle()


def test_no_event_comes_before_the_start_of_a_message() -> None:
    """A comment keeps the connection open until then, pings afterwards."""
    with serving(keep_alive_seconds=0.01) as slow:
        slow.slow_down(0.1)
        body = {"model": "deepseek-chat", "messages": QUESTION, "max_tokens": 5, "stream": True}
        lines = httpx.post(f"{slow.url}/v1/messages", json=body, timeout=60).text.splitlines()
        assert lines[0] == ": keep-alive"
        events = [line for line in lines if line.startswith("event: ")]
        assert events[0] == "event: message_start"
        assert "event: ping" in events
        assert ": keep-alive" not in lines[lines.index(events[0]) :]


def test_ollama_calls_tools_and_writes_json(llama: ollama.Client) -> None:
    tool: Any = {"type": "function", "function": {"name": "get_sea", "description": "Where.", "parameters": PARAMETERS}}
    listed = llama.chat(model="deepseek-chat", messages=QUESTION, tools=[tool], options={"num_predict": 4}, think=False)
    assert listed.prompt_eval_count is not None
    turns: list[Any] = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [{"function": {"name": "get_sea", "arguments": {"deep": True}}}]},
        {"role": "tool", "tool_name": "get_sea", "content": "north"},
    ]
    again = llama.chat(model="deepseek-chat", messages=turns, tools=[tool], options={"num_predict": 4}, think=False)
    assert (again.prompt_eval_count or 0) > listed.prompt_eval_count
    made = llama.chat(
        model="deepseek-chat", messages=QUESTION, format=PARAMETERS, options={"num_predict": 300, "seed": 4}, think=False
    )
    assert isinstance(json.loads(made.message.content or "")["deep"], bool)


def test_ollamas_options_beyond_their_ranges_mean_what_they_mean_there(llama: ollama.Client) -> None:
    def told(**options: Any) -> tuple[str | None, int | None]:
        answer = llama.chat("tiny", QUESTION, think=False, options={"num_predict": 9, "seed": 3} | options)
        return answer.message.content, answer.eval_count

    assert told(top_k=-1) == told(top_k=0) == told() != told(top_k=1)
    asked: Any = {"model": "tiny", "prompt": "鲸" * 300, "raw": True}
    long = llama.generate(**asked, options={"num_predict": 5000, "stop": ["never written"]})
    assert long.done_reason in ("length", "stop")
    assert (long.prompt_eval_count or 0) + (long.eval_count or 0) <= 1024


@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_client_gets_the_calls_of_tools(llama: ollama.Client, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Its API cannot ask for a call, which a tiny model would not make by itself; so the door is made to ask for one."""
    fields, call_wanted = ollama_door._chat_fields, {"tool_choice": "required", "parallel_tool_calls": False}
    monkeypatch.setattr(ollama_door, "_chat_fields", lambda *arguments: fields(*arguments) | call_wanted)
    tool: Any = {"type": "function", "function": {"name": "get_sea", "description": "Where.", "parameters": PARAMETERS}}
    asked: Any = {"model": "deepseek-chat", "messages": QUESTION, "tools": [tool], "options": {"num_predict": 400, "seed": 1}}
    parts = list(llama.chat(**asked, stream=True)) if stream else [llama.chat(**asked)]
    (call,) = (call for part in parts for call in part.message.tool_calls or [])
    assert call.function.name == "get_sea"
    assert set(call.function.arguments) == {"deep"}
    assert isinstance(call.function.arguments["deep"], bool)
    assert (parts[-1].done, parts[-1].done_reason) == (True, "stop")


def test_ollamas_client_gets_json_in_pieces(llama: ollama.Client) -> None:
    options = {"num_predict": 300, "seed": 4}
    asked: Any = {"model": "deepseek-chat", "format": PARAMETERS, "options": options, "think": False, "stream": True}
    chat = "".join(part.message.content or "" for part in llama.chat(messages=QUESTION, **asked))
    assert isinstance(json.loads(chat)["deep"], bool)
    text = "".join(part.response for part in llama.generate(prompt="Where?", **asked))
    assert isinstance(json.loads(text)["deep"], bool)
    anything = "".join(part.message.content or "" for part in llama.chat(messages=QUESTION, **asked | {"format": "json"}))
    assert anything.lstrip().startswith("{")


def test_ollama_generates_and_fills_in(served: Served, llama: ollama.Client) -> None:
    options = {"num_predict": 5, "temperature": 0}
    chat = llama.chat(model="tiny", messages=QUESTION, think=False, options=options)
    assert (
        llama.generate(model="tiny", prompt=QUESTION[0]["content"], think=False, options=options).response == chat.message.content
    )
    raw = llama.generate(model="tiny", prompt="One day", raw=True, options=options).response
    pieces = list(llama.generate(model="tiny", prompt="One day", raw=True, options=options, stream=True))
    assert "".join(piece.response for piece in pieces) == raw
    filled = llama.generate(model="tiny", prompt="One ", suffix=" whale", options=options)
    assert (filled.prompt_eval_count or 0) > 3
    made = llama.generate(model="tiny", prompt="One day", raw=True, format=PARAMETERS, options={"num_predict": 300, "seed": 4})
    assert isinstance(json.loads(made.response)["deep"], bool)
    with pytest.raises(ollama.ResponseError, match="field think"):
        llama.generate(model="tiny", prompt="One day", raw=True, think=True)
    assert llama.generate(model="tiny").done_reason == "load"


def test_ollama_lists_shows_and_refuses(served: Served, llama: ollama.Client) -> None:
    assert [model.model for model in llama.list().models] == ["deepseek-chat", "deepseek-reasoner", "tiny"]
    shown = llama.show("tiny")
    assert "thinking" in (shown.capabilities or [])
    assert (shown.modelinfo or {})["deepseek_v3.context_length"] == 1024
    assert "version" in httpx.get(f"{served.url}/api/version").json()
    with pytest.raises(ollama.ResponseError, match="there is no model 'llama3'") as told:
        llama.chat(model="llama3", messages=QUESTION)
    assert told.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="reads text only"):
        llama.generate(model="tiny", prompt="What is it?", images=[b"a picture"])
    with pytest.raises(ollama.ResponseError, match="temperature"):
        llama.chat(model="tiny", messages=QUESTION, options={"temperature": 9})
    for options, words in (({"top_k": "x"}, "field top_k: "), ({"num_predict": "x"}, "field num_predict: ")):
        for ask in (
            lambda o: llama.chat("tiny", QUESTION, options=o),
            lambda o: llama.generate("tiny", "x", raw=True, options=o),
        ):
            with pytest.raises(ollama.ResponseError, match=words):
                ask(options)
    with pytest.raises(ollama.ResponseError, match="field prompt makes a prompt of"):
        llama.generate("tiny", "鲸" * 2000)
    with pytest.raises(ollama.ResponseError, match="field top_k"):
        llama.chat("tiny", QUESTION, options={"top_k": 2**63})
