"""What may come from outside: bodies made by Schemathesis from our OpenAPI document, crowds that leave early; and what the log says."""

import asyncio
import itertools
import json
import logging
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from finback.server.keys import KeyStore, nano
from tests.server.serving import Served, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def check_document(served: Served, examples: int) -> int:
    """Ask every operation of the document so often; the number of operations."""
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=120)

        ask()
    return len(operations)


def test_made_bodies_find_no_server_error_and_no_breach() -> None:
    with serving(llm={"max_model_len": 96}) as served:
        assert check_document(served, 4) >= 15
        assert served.is_idle()


@pytest.mark.slow
def test_many_made_bodies_find_no_server_error_and_no_breach() -> None:
    with serving(llm={"max_model_len": 96}) as served:
        check_document(served, 300)
        assert served.is_idle()


KINDS = ("stream", "whole", "leave", "leave early", "leave", "leave early", "oversize", "malformed", "wrong key")


class Begun:
    """How many requests the engine has begun, as its own thread sees them."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        add, step, abort = served.llm.add, served.llm.step, served.llm.abort
        waiting = set[int]()

        def watched_add(*arguments: Any) -> int:
            request_id = add(*arguments)
            waiting.add(request_id)
            return request_id

        def watched_step() -> Any:
            increments = step()
            fresh = {each for each in waiting if served.llm.num_cached_tokens(each) is not None}
            fresh |= waiting & {increment.request_id for increment in increments}
            self.count += len(fresh)
            waiting.difference_update(fresh)
            return increments

        def watched_abort(request_id: int) -> bool:
            waiting.discard(request_id)
            return abort(request_id)

        for name, watched in (("add", watched_add), ("step", watched_step), ("abort", watched_abort)):
            monkeypatch.setattr(served.llm, name, watched)


async def leave_early(served: Served, secret: str, body: dict[str, Any], patience: float) -> int | None:
    """Ask, and leave where the head of the response takes longer than that; its status, or None."""
    address = httpx.URL(served.url)
    assert address.port is not None
    reader, writer = await asyncio.open_connection(address.host, address.port)
    content = json.dumps(body).encode()
    head = {
        "Host": "localhost", "Authorization": f"Bearer {secret}", "Content-Type": "application/json",
        "Content-Length": len(content), "Connection": "close",
    }  # fmt: skip
    lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + content)
    status = None
    try:
        status = int((await asyncio.wait_for(reader.readline(), patience)).split()[1])
        await reader.read()
    except TimeoutError:
        pass
    writer.close()
    await writer.wait_closed()
    return status


async def crowd(served: Served, secret: str, clients: int, seconds: float) -> dict[int | str, int]:
    """Clients that ask, leave in the middle or before there is a response, ask too much and send what is no JSON, until the time is
    over; how often what came."""
    url, seen = f"{served.url}/v1/chat/completions", dict[int | str, int]()
    deadline = time.monotonic() + seconds

    async def client(http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        for turn in itertools.count():
            if turn and time.monotonic() > deadline:
                return
            kind = chance.choice(KINDS) if turn else KINDS[number % len(KINDS)]  # each at least once
            words = "".join(chance.choice("鲸鱼向北游去 a whale") for _ in range(chance.randrange(1, 60)))
            body: dict[str, Any] = {
                "model": chance.choice(("tiny", "deepseek-reasoner")),
                "messages": [{"role": "user", "content": words * (400 if kind == "oversize" else 1)}],
                "max_tokens": chance.randrange(1, 40),
                "stream": kind in ("stream", "leave"),
            }
            headers = {"authorization": f"Bearer {'sk-wrong' if kind == 'wrong key' else secret}"}
            result: int | str
            if kind == "malformed":
                content = chance.choice((b"{", b"[]", b'{"model": 3}', b"\xff\x00", b'{"messages": [{"role": "king"}]}'))
                result = (
                    await http.post(url, content=content, headers=headers | {"content-type": "application/json"})
                ).status_code
            elif kind == "leave early":
                # Without stream the head comes with the answer's end.
                body |= {"stream": chance.random() < 0.3, "max_tokens": 200}
                result = await leave_early(served, secret, body, chance.choice((0, 0.3, 2, 6))) or "left early"
            elif kind == "leave":
                async with http.stream("POST", url, json=body, headers=headers) as answer:
                    left = chance.randrange(4)
                    async for _ in answer.aiter_lines():
                        left -= 1
                        if left < 0:
                            break
                result = "left" if answer.status_code == 200 else answer.status_code
            else:
                answer = await http.post(url, json=body, headers=headers)
                result = answer.status_code
                assert kind != "stream" or result != 200 or answer.text.endswith("data: [DONE]\n\n")
            seen[result] = seen.get(result, 0) + 1

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return seen


def check_crowd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int, seconds: float) -> None:
    keys = tmp_path / "keys.sqlite"
    store = KeyStore(keys, create=True)
    secret = store.add("crowd", nano(Decimal(1000)))
    with serving(keys, llm={"num_blocks": 60}) as served:
        begun = Begun(served, monkeypatch)
        seen = asyncio.run(crowd(served, secret, clients, seconds))
        assert served.is_idle(), "blocks are held that nobody uses"
        assert httpx.get(f"{served.url}/health").status_code == 200
        metrics = httpx.get(f"{served.url}/metrics").text
    assert not any(isinstance(status, int) and status >= 500 for status in seen), seen
    assert seen[401] + seen[400] > 0
    (key,) = store.all()
    requests, _, cost = store.usage(key.id)
    answered = seen.get(200, 0) + seen.get("left", 0)
    gone = seen["left early"]
    assert gone > 0
    assert answered <= begun.count <= answered + gone
    assert requests == begun.count, "all that the engine began is accounted for, once"
    assert key.balance == nano(Decimal(1000)) - cost
    ended = sum(
        float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith("finback:request_success_total")
    )
    assert requests <= ended <= answered + gone, "those that left while they waited may be counted, too"
    store.close()


def test_a_small_crowd_is_served_and_accounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_crowd(tmp_path, monkeypatch, clients=16, seconds=1.0)


@pytest.mark.slow
def test_a_crowd_of_64_for_two_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_crowd(tmp_path, monkeypatch, clients=64, seconds=120.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_our_own_is_a_500_and_ends(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    with serving() as served:
        monkeypatch.setattr("finback.server.turn.ReasoningParser.feed", lambda *_: 1 / 0)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "stream": stream}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert served.is_idle()


def test_a_request_that_the_engine_cannot_take_ends_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    schema = {"type": "object", "properties": {"city": {"type": "string", "required": True}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with serving() as served:
        url = f"{served.url}/v1/chat/completions"
        assert httpx.post(url, json=body | {"response_format": form}, timeout=30).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(served.llm, "add", lambda *_: 1 / 0)
            answer = httpx.post(url, json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in caplog.text
        assert httpx.post(url, json=body, timeout=30).status_code == 200
        assert served.is_idle()


LETTERS = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(10)]}
FUNCTION = {"name": "spell", "parameters": {"type": "object", "properties": {"word": LETTERS}}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LETTERS}}}),
        ("v1/chat/completions", {"tools": [{"type": "function", "function": FUNCTION}], "n": 4}),
        ("v1/messages", {"tools": [{"name": "spell", "input_schema": FUNCTION["parameters"]}], "max_tokens": 4}),
        ("api/chat", {"format": LETTERS}),
        ("api/chat", {"tools": [{"type": "function", "function": FUNCTION}], "stream": True}),
        ("api/generate", {"format": LETTERS, "prompt": "x", "raw": True}),
    ],
)
def test_a_schema_of_too_many_patterns_is_refused_at_every_door(path: str, fields: dict[str, Any]) -> None:
    with serving() as served:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": False} | fields
        answer = httpx.post(f"{served.url}/{path}", json=body, timeout=30)
        assert answer.status_code == 400
        assert "asks for 10 regular expressions (pattern, format) for one string" in answer.text
        assert served.is_idle()


def test_a_step_that_fails_ends_what_had_begun_and_not_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True}
    fails = threading.Event()
    with serving(llm={"max_num_seqs": 1}) as served, ThreadPoolExecutor(1) as pool:
        served.slow_down()
        forward, url = served.llm._runner.forward, f"{served.url}/v1/chat/completions"

        def fragile(*arguments: Any) -> Any:
            if fails.is_set():
                fails.clear()
                raise RuntimeError("out of memory")
            return forward(*arguments)

        monkeypatch.setattr(served.llm._runner, "forward", fragile)
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            waits = pool.submit(httpx.post, url, json=body | {"max_tokens": 3}, timeout=60)
            deadline = time.monotonic() + 20
            while served.llm.scheduler_stats.num_waiting < 1:
                assert time.monotonic() < deadline
            fails.set()
            assert "the engine failed" in list(lines)[-2]
        assert waits.result().json()["usage"]["completion_tokens"] == 3
        assert served.is_idle()


def test_neither_keys_nor_prompts_are_logged_or_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = tmp_path / "keys.sqlite"
    store = KeyStore(keys, create=True)
    secret = store.add("alice", nano(Decimal(1)))
    store.close()
    with caplog.at_level(logging.INFO), serving(keys) as served:
        for headers in ({"authorization": f"Bearer {secret}"}, {"authorization": "Bearer sk-mistyped"}):
            for body in (
                {"model": "tiny", "messages": [{"role": "user", "content": "xyzzy"}], "max_tokens": 2},
                {"messages": "xyzzy"},
            ):
                httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers)
    for hidden in (secret, "sk-mistyped", "xyzzy"):
        assert hidden not in caplog.text
        for file in tmp_path.iterdir():
            assert hidden.encode() not in file.read_bytes()
    with sqlite3.connect(keys) as database:
        assert database.execute("SELECT count(*) FROM usage").fetchone() == (1,)
    database.close()
