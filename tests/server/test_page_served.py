"""The chat page on the real service: a tiny random model that is made on the spot, asked from headless Chromium."""

import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finback.server.keys import NANO, KeyStore
from tests.server.page_browser import Page, chromium, needs_browser

pytest.importorskip("finback.server.app", reason="the service needs the packages of the extra serve")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def limit_answers(page: Page, tokens: int) -> None:
    """At temperature 0 as well, where a random model says the same each time."""
    page.tab.click("#settings-open")
    page.tab.locator("#temperature").fill("0")
    page.tab.fill("#max-tokens", str(tokens))
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Escape")


@needs_browser
def test_finback_serve_shows_a_page_that_answers(browser: Any, tmp_path: Path) -> None:
    """The verb itself, its files and its policy headers: a question streams a thought and its counts, with nothing refused."""
    from tests.server.serving import write_model

    command = [sys.executable, "-m", "finback", "serve", str(write_model(tmp_path)), "--port", "0"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        address = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
        try:
            assert address
            page = Page(browser, address[0])
            assert sorted(page.tab.locator("#model option").all_inner_texts())[:2] == ["deepseek-chat", "deepseek-reasoner"]
            limit_answers(page, 24)
            page.ask("Which whale is the second largest?")
            assert re.search(r"\d+ in · \d+ out · \d+ thought", page.text(".usage"))
            assert page.text(".note") == "The answer reached the token limit."
            assert page.text(".thought summary").startswith("Thought for ")
            page.tab.select_option("#model", "deepseek-chat")
            page.ask("And without a thought?")
            assert len(page.text(".answer")) > 0
            assert page.tab.locator(".assistant").last.locator(".thought").is_hidden()
            assert page.problems == []
            page.context.close()
        finally:
            process.terminate()
    assert process.returncode == 0


@needs_browser
def test_the_apis_page_shows_every_operation_and_fetches_nothing_from_elsewhere(browser: Any) -> None:
    from tests.server.serving import serving

    with serving() as served:
        page = Page(browser, served.url)
        asked: list[str] = []
        page.tab.on("request", lambda request: asked.append(request.url))
        page.tab.goto(f"{served.url}/docs")
        page.tab.wait_for_selector("details")
        paths = page.tab.evaluate(
            "fetch('/openapi.json').then((answer) => answer.json()).then(({ paths }) => Object.keys(paths))"
        )
        shown = page.tab.locator("summary code").all_inner_texts()
        assert sorted(each.split(" ")[1] for each in shown) == sorted(paths)
        page.tab.click("text=POST /v1/chat/completions")
        fields = page.tab.locator("details[open] tr").all_inner_texts()
        assert any(re.match(r"messages\s+list of Message\s+required", each) for each in fields), fields
        assert any(re.match(r"n\s+whole number at least 1, at most 16", each) for each in fields), fields
        assert {each for each in asked if not each.startswith(served.url)} == set()
        page.context.close()
        assert page.problems == []


def told(page: Page) -> list[float]:
    """The page's sum of the conversation: hits, misses, tokens of answers, nano-yuan."""
    spent = page.tab.evaluate(
        "JSON.parse(localStorage.getItem(Object.keys(localStorage).find((name) => name.startsWith('finback.conversation.')))).spent"
    )
    return [*(spent["usage"][name] for name in ("hit", "miss", "output")), round(spent["price"] * NANO)]


def charged(keys: Path) -> list[float]:
    """The server's, over all requests."""
    with closing(sqlite3.connect(keys)) as database:
        return list(
            database.execute("SELECT sum(hit_tokens), sum(miss_tokens), sum(output_tokens), sum(cost) FROM usage").fetchone()
        )


@needs_browser
def test_the_page_counts_what_the_server_charges(browser: Any, tmp_path: Path) -> None:
    """An answer, one in its place that is stopped, and a reload: the prompts as they were charged, and of the answers what came."""
    from tests.server.serving import serving

    keys = tmp_path / "keys.sqlite"
    store = KeyStore(keys, create=True)
    secret = store.add("ann", NANO)
    with serving(keys) as served:
        served.slow_down()
        page = Page(browser, served.url)
        page.tab.click("#settings-open")
        page.tab.fill("#key", secret)
        page.tab.keyboard.press("Tab")
        page.tab.keyboard.press("Escape")
        page.tab.wait_for_selector("#model option", state="attached")
        page.tab.select_option("#model", "deepseek-chat")
        limit_answers(page, 24)
        page.ask("Which whale is the second largest? " * 4)
        first = told(page)
        assert first == charged(keys)
        limit_answers(page, 900)
        page.tab.click(".actions .again")
        page.wait("(document.querySelector('.answer')?.textContent.length ?? 0) > 10")
        page.tab.click("#stop")
        page.wait_idle()
        assert served.is_idle()
        page.wait("document.querySelector('.usage') !== null")
        deadline = time.monotonic() + 20
        while (paid := charged(keys)) == first:
            assert time.monotonic() < deadline
        shown = told(page)
        assert shown[0] == paid[0] > first[0], "the second reads what the first has left"
        assert shown[1] == paid[1] > first[1]
        assert first[2] < shown[2] <= paid[2] < first[2] + 900
        assert shown[3] == paid[3] - 16_000 * (paid[2] - shown[2])
        page.tab.reload()
        page.tab.wait_for_selector(".usage")
        assert told(page) == shown
        page.context.close()
        assert page.problems == []
    store.close()


@needs_browser
def test_stopping_frees_what_the_request_held(browser: Any) -> None:
    from tests.server.serving import serving

    with serving() as served:
        page = Page(browser, served.url)
        page.tab.select_option("#model", "deepseek-chat")
        limit_answers(page, 900)
        page.ask("Tell a long story", wait=False)
        page.wait("(document.querySelector('.answer')?.textContent.length ?? 0) > 10")
        page.tab.click("#stop")
        page.wait_idle()
        assert page.text(".note") == "You stopped this answer."
        assert served.is_idle()
        page.context.close()
        assert page.problems == []
