"""The chat page and a hostile model: nothing in an answer runs, fetches or hides, and no length of it stops the page."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.page_browser import Page, chromium, needs_browser
from tests.server.page_peer import Script, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


HOSTILE = r"""<script>window.broken = 1</script>
<img src=x onerror="window.broken = 2"> <svg onload="window.broken = 3"><a xlink:href="javascript:window.broken=4">x</a></svg>
<iframe srcdoc="<script>parent.broken = 5</script>"></iframe><base href="https://evil.example/"><style>body{display:none}</style>
<form action="/x"><button formaction="javascript:window.broken=6">b</button></form>
<math><mtext></mtext><mglyph><style><img src=x onerror=broken=7></style></mglyph></math>

[a](javascript:window.broken=8) [b](JaVaScRiPt&colon;window.broken=9) [c](data:text/html,<script>window.broken=10</script>)
[d](vbscript:x "t\" onmouseover=window.broken=11") ![e](x" onerror="window.broken=12) ![f](https://evil.example/leak?q=1)
![g](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImJyb2tlbj0xMyIvPg==) <javascript:window.broken=14> <https://ok.example>
[good](https://good.example)

$\href{javascript:window.broken=15}{x}$ $\htmlData{x=y}{z}$ $\includegraphics{https://evil.example/i.png}$ $\def\a{\a\a}\a$
$$\url{javascript:window.broken=16}$$ $\class{"><img src=x onerror=window.broken=17>}{x}$

```html" onload="window.broken=18
<script>window.broken = 19</script>
```
| <img src=x onerror=window.broken=20> | <b onclick=window.broken=21>x</b> |
|---|---|
| `<script>window.broken=22</script>` | 1 |

````unclosed <script>window.broken = 23</script>
</code></pre><script>window.broken = 24</script>
"""


@needs_browser
def test_hostile_output_stays_text(browser: Any) -> None:
    """No tag, handler, address or formula of an answer runs, fetches or restyles anything, cut at any point or whole."""
    pieces = [HOSTILE[at : at + 40] for at in range(0, len(HOSTILE), 40)]
    script = Script(answers={"hostile": [(each, "") for each in pieces] + [("", each) for each in pieces]})
    with serving(script) as (url, _):
        page = Page(browser, url)
        asked: list[str] = []
        page.tab.on("request", lambda request: asked.append(request.url))
        page.ask("hostile <img src=x onerror=window.broken=30>")
        page.tab.click(".thought summary")
        page.tab.wait_for_selector(".thought-body pre")
        page.tab.locator("#messages a").evaluate_all(
            "links => links.forEach((link) => link.dispatchEvent(new MouseEvent('mouseover')))"
        )
        found = page.tab.evaluate(
            """() => ({
              broken: window.broken ?? null,
              tags: document.querySelectorAll("#messages :is(script, iframe, form, style, base, object, embed, img)").length,
              handlers: [...document.querySelectorAll("#messages *")].filter((node) =>
                [...node.attributes].some(({ name, value }) =>
                  name.startsWith("on") || /^\\s*(javascript|vbscript|data):/i.test(value))).length,
              links: [...document.querySelectorAll("#messages .answer a")].map((link) => [link.protocol, link.rel, link.target]),
              shown: document.querySelector(".answer").innerText,
            })"""
        )
        assert found["broken"] is None
        assert found["tags"] == 0
        assert found["handlers"] == 0
        assert found["links"]
        assert {tuple(each) for each in found["links"]} == {("https:", "noopener noreferrer nofollow", "_blank")}
        assert "<script>window.broken = 1</script>" in found["shown"]
        assert "window.broken = 24" in found["shown"]
        assert {each for each in asked if not each.startswith((url, "blob:"))} == set()
        assert script.other_paths == []
        assert [each for each in page.problems if "Content Security Policy" in each or "dialog" in each] == []
        page.context.close()


LONG = {
    "prose": "A paragraph with **bold**, `code` and $x^2$ in it.\n\n",
    "code": "```python\n" + "print('a line of a program that has no end')\n" * 50,
    "brackets": "[" * 4000 + "*_" * 3000 + "`" * 1000 + "$" * 500 + "\\\\(" * 500 + "\n",
    "quotes": ">" * 9000 + "\n" + "- " * 5000 + "\n",
    "line": "word " * 5000,
    "cells": "|a" * 200 + "|\n" + "|-" * 200 + "|\n" + ("|b" * 200 + "|\n") * 20,
}


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_leaves_the_page_responsive(browser: Any, kind: str) -> None:
    """The text arrives whole, is shown in small steps, and is stored."""
    text = (LONG[kind] * (1_000_000 // len(LONG[kind]) + 1))[:1_000_000]
    script = Script(answers={"long": [("", text[at : at + 20_000]) for at in range(0, len(text), 20_000)]})
    with serving(script) as (url, _):
        page = Page(browser, url)
        page.tab.evaluate(
            "{ window.drawnLate = 0; const beat = () => { requestAnimationFrame(beat);"
            " if (document.querySelector('.answer')?.hasChildNodes()) window.drawnLate += 1; }; requestAnimationFrame(beat); }"
        )
        page.ask("long text", wait=False)
        page.wait("!document.body.classList.contains('busy') && document.querySelector('.assistant .actions .again') !== null")
        length = "document.querySelector('.answer').textContent.length"
        seen = -1
        for _ in range(400):
            page.tab.wait_for_timeout(250)
            now = page.tab.evaluate(length)
            if now == seen:
                break
            seen = now
        assert seen > 600_000  # what is typeset loses its signs
        assert page.tab.evaluate("window.drawnLate") > 10  # the browser drew between the steps
        stored = (
            "JSON.parse(Object.entries(localStorage).find(([key]) => key.includes('conversation'))[1]).messages[1].content.length"
        )
        assert page.tab.evaluate(stored) == len(text)
        page.context.close()
