"""Long bodies: what cannot fit is refused at once, what is tokenised long holds nobody else up, and counting tokens is limited too."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from finback.data.tokenizer import Tokenizer
from finback.server.keys import KeyStore, nano
from tests.server.serving import TEXTS, Served, serving, tiny_model

LONG = "鲸鱼 whale " * 20_000
DOORS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("messages", {"messages": [{"role": "user", "content": LONG}]}),
    "/v1/completions": ("prompt", {"prompt": LONG}),
    "/v1/messages": ("messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1}),
    "/api/chat": ("messages", {"messages": [{"role": "user", "content": LONG}]}),
    "/api/generate": ("prompt", {"prompt": LONG}),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        assert running.is_idle()


def told(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("path", DOORS)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(served: Served, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, body = DOORS[path]
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_, **__: 1 / 0)
    answer = httpx.post(f"{served.url}{path}", json={"model": "tiny"} | body, timeout=60)
    assert answer.status_code == 400
    most = served.service.tokenizer.most_bytes_per_token
    assert most is not None
    assert told(answer).startswith(f"field {field} makes a prompt of at least ")
    assert int(told(answer).split("at least ")[1].split()[0]) >= len(LONG.encode()) // most


TINY = tiny_model()[1]


@given(st.text() | st.text(alphabet=" \nwhale鲸鱼").map(lambda text: text * 9) | st.just("<｜end▁of▁sentence｜>" * 9))
def test_no_token_has_more_bytes_than_the_longest(text: str) -> None:
    assert TINY.most_bytes_per_token == len("<｜tool▁outputs▁begin｜>".encode())
    assert len(text.encode()) <= len(TINY.encode(text)) * TINY.most_bytes_per_token


def test_there_is_no_bound_where_text_gets_shorter_or_a_token_takes_what_is_beside_it() -> None:
    shorter, greedy = tiny_model()[1], tiny_model()[1]
    shorter.backend.normalizer = normalizers.NFC()
    assert shorter.most_bytes_per_token is None
    greedy.backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert Tokenizer(greedy.backend, greedy.config).most_bytes_per_token is None


@pytest.mark.parametrize("path", [*DOORS, "/v1/messages/count_tokens"])
def test_the_server_answers_others_while_it_tokenises(served: Served, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on, tokenise = threading.Event(), threading.Event(), Tokenizer.encode_batch
    text = TEXTS[0] * 80

    def held_up(self: Tokenizer, *arguments: Any, **options: Any) -> list[list[int]]:
        begun.set()
        assert goes_on.wait(60)
        return [ids[:20] for ids in tokenise(self, *arguments, **options)]

    monkeypatch.setattr(Tokenizer, "encode_batch", held_up)
    body: dict[str, Any] = (
        {"prompt": text} if path in ("/v1/completions", "/api/generate") else {"messages": [{"role": "user", "content": text}]}
    )
    body |= {"model": "deepseek-chat", "max_tokens": 1, "options": {"num_predict": 1}, "stream": False}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{served.url}{path}", json=body, timeout=60)
        try:
            assert begun.wait(60)
            assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200
        finally:
            goes_on.set()
        assert answer.result().status_code == 200


def test_what_waits_to_be_tokenised_is_admitted_no_more_where_others_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on, tokenise = threading.Event(), threading.Event(), Tokenizer.encode_batch

    def held_up(self: Tokenizer, *arguments: Any, **options: Any) -> list[list[int]]:
        begun.set()
        assert goes_on.wait(60)
        return [ids[:20] for ids in tokenise(self, *arguments, **options)]

    monkeypatch.setattr(Tokenizer, "encode_batch", held_up)
    with serving(max_num_seqs=1, max_waiting=0) as full, ThreadPoolExecutor(1) as pool:
        full.slow_down()
        url, body = f"{full.url}/v1/completions", {"model": "tiny", "max_tokens": 900, "ignore_eos": True}
        late = pool.submit(httpx.post, url, json=body | {"prompt": TEXTS[0] * 80}, timeout=60)
        try:
            assert begun.wait(60)
            with httpx.stream("POST", url, json=body | {"prompt": "One", "stream": True}, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                goes_on.set()
                assert late.result().status_code == 503
        finally:
            goes_on.set()


def test_counting_tokens_obeys_balance_and_rate(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite", create=True)
    spent, slow = store.add("spent"), store.add("slow", nano(Decimal(1)), requests_per_minute=2)
    store.close()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "One day"}]}
    with serving(tmp_path / "keys.sqlite") as served:
        url = f"{served.url}/v1/messages/count_tokens"
        statuses = [httpx.post(url, json=body, headers={"x-api-key": secret}).status_code for secret in (spent, slow, slow, slow)]
    assert statuses == [402, 200, 200, 429]
