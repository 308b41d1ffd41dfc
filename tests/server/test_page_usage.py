"""What the chat page says of tokens and money: of answers that were stopped or broke off, and of those that were replaced."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.page_browser import Page, chromium, needs_browser
from tests.server.page_peer import Script, serving

ANSWERS = {"bare": [("", "No thought.")], "midway": [("", "Some words")], "closing": [("", "Some words")]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    with serving(Script(answers=dict(ANSWERS))) as (url, _):
        opened = Page(browser, url)
        yield opened
        opened.context.close()
        assert opened.problems == []


def stop_a_story(page: Page) -> int:
    """Stop the answer that is coming; how many tokens of it came."""
    page.wait("document.body.classList.contains('busy')")
    page.wait("([...document.querySelectorAll('.answer')].at(-1)?.innerText.length ?? 0) > 20")
    page.tab.click("#stop")
    page.wait_idle()
    return 1 + page.text(".answer").count("and on")


def total(page: Page) -> tuple[int, int, int, float]:
    """Of the conversation: prompt, of it cached, answers, price in millionths."""
    found = re.fullmatch(r"This conversation: ([\d,]+) in \(([\d,]+) cached\) · ([\d,]+) out · ¥([\d.]+)", page.text("#total"))
    assert found, page.text("#total")
    prompt, cached, output = (int(each.replace(",", "")) for each in found.groups()[:3])
    return prompt, cached, output, float(found[4]) * 1e6


def reload(page: Page) -> None:
    page.tab.reload()
    page.tab.wait_for_selector("#model option", state="attached")
    page.wait_idle()


def exported(page: Page) -> Any:
    page.tab.click("#export")
    with page.tab.expect_download() as waiting:
        page.tab.click("#export-json")
    return json.loads(Path(waiting.value.path()).read_text())


@needs_browser
def test_a_stopped_answer_counts_what_came_of_it(page: Page) -> None:
    page.ask("endless story", wait=False)
    tokens = stop_a_story(page)
    assert page.text(".note") == "You stopped this answer."
    assert f"100 in (64 cached) · {tokens} out · 1 thought · ¥0.00" in page.text(".usage")
    shown = total(page)
    assert shown[:3] == (100, 64, tokens)
    assert shown[3] == pytest.approx(64 * 1 + 36 * 4 + tokens * 16, rel=0.05)
    reload(page)
    assert f"{tokens} out" in page.text(".usage")
    assert total(page) == shown


@needs_browser
def test_an_answer_that_a_reload_cut_off_counts_what_came_of_it(page: Page) -> None:
    page.ask("endless story", wait=False)
    page.wait("(document.querySelector('.answer')?.innerText.length ?? 0) > 20")
    reload(page)
    assert total(page)[:3] == (100, 64, 1 + page.text(".answer").count("and on"))


@needs_browser
def test_what_a_conversation_spent_never_shrinks(page: Page) -> None:
    page.ask("bare question")
    assert total(page)[:3] == (100, 64, 30)
    page.tab.click(".actions .again")
    page.wait("!document.body.classList.contains('busy')")
    page.wait_idle()
    assert "100 in (64 cached) · 30 out" in page.text(".usage"), "of this answer alone"
    assert total(page)[:3] == (200, 128, 60)
    page.tab.click(".user .edit")
    page.tab.fill(".editing textarea", "endless instead")
    page.tab.press(".editing textarea", "Enter")
    tokens = stop_a_story(page)
    assert total(page)[:3] == (300, 192, 60 + tokens)
    reload(page)
    assert total(page)[:3] == (300, 192, 60 + tokens)
    page.tab.click(".actions .again")
    tokens += stop_a_story(page)
    shown = total(page)
    assert shown[:3] == (400, 256, 60 + tokens)
    assert shown[3] == pytest.approx(256 * 1 + 144 * 4 + (60 + tokens) * 16, rel=0.05)
    spent = exported(page)["spent"]
    assert spent["usage"] == {"hit": 256, "miss": 144, "output": 60 + tokens, "thought": 26}
    assert spent["price"] == pytest.approx((256 * 1 + 144 * 4 + (60 + tokens) * 16) / 1e6)
    page.tab.click("#new")
    assert page.tab.locator("#total").inner_text() == ""


@needs_browser
def test_a_failure_of_the_servers_own_costs_nothing_and_other_ends_do(page: Page) -> None:
    page.ask("midway trouble")
    assert page.text(".note") == "The server refused: engine trouble"
    assert page.tab.locator(".usage").count() == 0
    assert page.tab.locator("#total").inner_text() == ""
    page.ask("closing time")
    assert page.text(".note") == "The server refused: the server is stopping"
    assert "100 in (64 cached) · 1 out" in page.text(".usage")
    assert total(page)[:3] == (100, 64, 1)


@needs_browser
def test_conversations_that_were_stored_without_their_sum_have_that_of_their_answers(page: Page) -> None:
    page.ask("bare question")
    page.ask("bare again")
    edit = """(change) => {
      const name = Object.keys(localStorage).find((each) => each.startsWith("finback.conversation."));
      const stored = JSON.parse(localStorage.getItem(name));
      stored.spent = change;
      localStorage.setItem(name, JSON.stringify(stored));
    }"""
    page.tab.evaluate(edit)
    reload(page)
    assert total(page)[:3] == (200, 128, 60)
    page.tab.click(".actions .again")
    page.wait("!document.body.classList.contains('busy')")
    page.wait_idle()
    assert total(page)[:3] == (300, 192, 90)
    page.tab.evaluate(edit, {"usage": 5})
    page.tab.reload()
    page.tab.wait_for_selector("#toast", state="visible")
    assert "could not be read" in page.text("#toast-text")
