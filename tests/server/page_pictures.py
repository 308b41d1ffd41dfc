"""Pictures of the chat page for the documents: in the light of a desk, and in the dark on a phone.

`python -m tests.server.page_pictures docs/images` takes them of a scripted answer, with `--url http://127.0.0.1:8000` of a server's
own (`finback serve`); `--question` may be given several times for several turns. They are `chat_page.png` and `chat_page_phone.png`.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from tests.server.page_browser import Page, chromium
from tests.server.page_peer import Script, serving

QUESTION = "How many prime numbers are there below 20?"
THOUGHT = "A prime has no divisor but 1 and itself. I go through 2 to 19.\n\n2, 3, 5, 7, 11, 13, 17, 19: these are eight.\n"
ANSWER = (
    "There are **eight**: 2, 3, 5, 7, 11, 13, 17 and 19. In formulas, $\\pi(19) = 8$, and it is enough to divide by primes up to "
    "$\\sqrt{19} \\approx 4.4$.\n\n```python\nsum(all(n % d for d in range(2, n)) for n in range(2, 20))\n```\n"
)
LOOKS: dict[str, dict[str, Any]] = {
    "chat_page.png": {"viewport": {"width": 1100, "height": 720}, "color_scheme": "light"},
    "chat_page_phone.png": {
        "viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "device_scale_factor": 2, "has_touch": True,
        "is_mobile": True,
    },
}  # fmt: skip


def take(directory: Path, url: str, questions: list[str], model: str | None, max_tokens: int | None, opened: bool) -> None:
    """Both pictures, into a directory that exists; the last answer's thought is `opened` or folded."""
    with chromium() as browser:
        for name, look in LOOKS.items():
            page = Page(browser, url, **look)
            if model is not None:
                page.tab.select_option("#model", model)
            if max_tokens is not None:
                page.tab.click("#settings-open")
                page.tab.fill("#max-tokens", str(max_tokens))
                page.tab.keyboard.press("Tab")
                page.tab.keyboard.press("Escape")
            for question in questions:
                page.ask(question, wait=False)
                page.wait_idle(minutes=10)
            if opened and page.tab.locator(".thought:visible").count():
                page.tab.locator(".thought:visible summary").last.click()
                page.tab.mouse.move(0, 0)
                page.tab.wait_for_timeout(300)
            page.tab.screenshot(path=directory / name)
            page.context.close()
            assert page.problems == [], page.problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--url", help="of a server; without it a scripted answer is shown")
    parser.add_argument("--question", action="append")
    parser.add_argument("--model", help="one of the page's models")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--folded", action="store_true", help="leave the thought folded")
    words = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = words.url
        if url is None:
            script = Script(answers={"How": [(THOUGHT, ""), ("", ANSWER)]})
            url, _ = stack.enter_context(serving(script))
        take(words.directory, url, words.question or [QUESTION], words.model, words.max_tokens, not words.folded)


if __name__ == "__main__":
    main()
