"""A browser for the chat page's tests: headless Chromium through playwright, and a fresh profile on a page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser with the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need chromium on the PATH")


@contextmanager
def chromium() -> Iterator[Any]:
    """A started browser."""
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # containers run as root
        yield started
        started.close()


class Page:
    """A fresh browser profile on the peer's page; what goes wrong inside it is kept in `problems`."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 720}, "locale": "en-US", **options})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.problems: list[str] = []
        self.url = url
        self.open()

    def open(self) -> None:
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(20_000)
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.tab.on("dialog", lambda dialog: (self.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.tab.goto(self.url)
        self.tab.wait_for_selector("#model option", state="attached")

    def ask(self, question: str, *, wait: bool = True) -> None:
        self.tab.fill("#question", question)
        self.tab.press("#question", "Enter")
        if wait:
            self.wait_idle()

    def wait(self, expression: str, minutes: float = 1 / 3) -> None:
        """Until an expression is true. Playwright's own way evaluates inside the page, which the page's policy forbids."""
        for _ in range(int(minutes * 60 / 0.02)):
            if self.tab.evaluate(expression):
                return
            self.tab.wait_for_timeout(20)
        raise AssertionError(f"never true: {expression}")

    def wait_idle(self, minutes: float = 1 / 3) -> None:
        self.wait(
            "document.querySelector('.assistant .actions .again') && !document.body.classList.contains('busy')"
            " && [...document.querySelectorAll('.tail')].every((tail) => !tail.hasChildNodes())",
            minutes,
        )

    def text(self, selector: str) -> str:
        return str(self.tab.locator(selector).last.inner_text())
