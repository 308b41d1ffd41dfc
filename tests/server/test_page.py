"""The chat page in headless Chromium, against a scripted peer: what a reader sees, and what a hostile answer cannot do."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.page_browser import Page, chromium, needs_browser
from tests.server.page_peer import STATIC, Script, serving

ANSWERS = {
    "sum": [
        ("First add ", ""),
        ("the *units*.", ""),
        ("", "The sum is **42**.\n\n```py"),
        ("", "thon\nprint(40 + 2)\n```\n\n"),
        ("", "And $e^{i\\pi}"),
        ("", " = -1$, 你好。\n\n$$\\frac{1}{2}$$\n\n| a | b |\n|--:|---|\n| 1 | 2 |\n"),
    ],
    "cut": [("", "Only half of the")],
    "pondering": [("Half of a thou", "")],
    "midway": [("", "Some words")],
    "求和": [("先想一想。", ""), ("", "答案是 42。")],
    "bare": [("", "No thought.")],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def peer() -> Iterator[tuple[str, Script]]:
    script = Script(answers=dict(ANSWERS))
    with serving(script) as (url, _):
        yield url, script


@pytest.fixture
def page(browser: Any, peer: tuple[str, Script]) -> Iterator[Page]:
    opened = Page(browser, peer[0])
    yield opened
    opened.context.close()
    assert opened.problems == []


def test_every_string_exists_in_both_languages() -> None:
    """The names in the two tables, those in the page, and those in the scripts are the same set."""
    source = (STATIC / "i18n.js").read_text()
    english, chinese = source.split("  zh: {")
    names = [re.findall(r"^    (\w+): \"", half, re.MULTILINE) for half in (english, chinese)]
    assert names[0] == names[1]
    assert len(names[0]) > 60
    fields = [re.findall(r"\{(\w+)\}", line) for line in source.splitlines() if re.match(r"    \w+: \"", line)]
    half = len(names[0])
    assert [sorted(each) for each in fields[:half]] == [sorted(each) for each in fields[half:]]
    used = set(re.findall(r"data-i18n(?:-\w+)?=\"(\w+)\"", (STATIC / "index.html").read_text()))
    for script in STATIC.glob("*.js"):
        used |= set(re.findall(r"\bt\(\"(\w+)\"", script.read_text()))
    assert used <= set(names[0])


def test_page_names_no_other_host_and_forbids_inline_code() -> None:
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", html)
    assert not re.search(r"\son\w+=|<script>|style=", html)
    policy = re.search(r"Content-Security-Policy\" content=\"([^\"]+)", html)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]


def test_bundles_are_small_and_carry_their_licences() -> None:
    vendor = STATIC / "vendor"
    assert sum(file.stat().st_size for file in vendor.rglob("*") if file.is_file()) < 1_200_000
    assert all((folder / "LICENSE").is_file() for folder in vendor.iterdir())


NODE_EVENTS = """
import { events } from %s;
const bytes = new TextEncoder().encode(%s);
for (let size = 1; size <= bytes.length; size++) {
  let at = 0;
  const reader = { read: async () => at >= bytes.length ? { done: true } : { done: false, value: bytes.slice(at, (at += size)) } };
  const found = [];
  for await (const data of events(reader)) found.push(data);
  console.log(JSON.stringify(found));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node on the PATH")
def test_events_are_the_same_wherever_the_bytes_are_cut(tmp_path: Path) -> None:
    wire = ': keep-alive\n\ndata: {"a": "深度🐋"}\r\n\r\n:x\ndata:{"b":1}\nevent: y\n\ndata: [DONE]\n\n'
    module = tmp_path / "stream.mjs"
    module.write_text((STATIC / "stream.js").read_text())
    program = tmp_path / "test.mjs"
    program.write_text(NODE_EVENTS % (json.dumps(module.as_uri()), json.dumps(wire)))
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(wire.encode())
    assert all(each == ['{"a": "深度🐋"}', '{"b":1}', "[DONE]"] for each in found)


@needs_browser
def test_question_streams_thought_and_rendered_answer(page: Page, peer: tuple[str, Script]) -> None:
    page.ask("sum of 40 and 2")
    request = peer[1].requests[-1]
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert request["model"] == "deepseek-reasoner"
    assert request["messages"] == [{"role": "user", "content": "sum of 40 and 2"}]
    assert "max_tokens" not in request

    tab = page.tab
    assert re.fullmatch(r"Thought for \d+\.\d s", page.text(".thought summary"))
    assert not tab.locator(".thought").evaluate("node => node.open")  # folded once the answer began
    tab.click(".thought summary")
    tab.wait_for_selector(".thought-body em")
    assert page.text(".thought-body").strip() == "First add the units."

    answer = tab.locator(".answer")
    assert answer.locator("strong").inner_text() == "42"
    assert answer.locator(".code-head span").inner_text() == "python"
    assert answer.locator(".hljs-built_in").inner_text() == "print"
    assert answer.locator(".katex").count() == 2
    assert answer.locator(".katex-display").count() == 1
    assert answer.locator("td[align=right]").inner_text() == "1"
    assert "你好。" in answer.inner_text()
    # 64 * 1 + 36 * 4 + 30 * 16 = 688 millionths of a yuan
    assert "100 in (64 cached) · 30 out · 12 thought · ¥0.00069" in page.text(".usage")
    assert page.text("#total") == "This conversation: 100 in (64 cached) · 30 out · ¥0.00069"
    assert page.text("#announce") == "The answer is complete"


@needs_browser
def test_a_long_thought_streams_in_few_drawings_and_opens_at_its_beginning(browser: Any) -> None:
    """Ten thousand tokens, each an event of its own: the page draws by frames and not by tokens, and whoever opens the thought reads it
    from its first line."""
    thought = [f"step {i} is so{'.' if i % 20 else chr(10) * 2} " for i in range(10_000)]
    script = Script(answers={"long": [(token, "") for token in thought] + [("", "It is 42.")]})
    with serving(script) as (url, _):
        page = Page(browser, url)
        page.tab.evaluate(
            "{ window.drawings = 0; new MutationObserver(() => { window.drawings += 1; })"
            ".observe(document.getElementById('messages'), { childList: true, subtree: true }); }"
        )
        page.ask("long thought")
        assert page.text(".answer") == "It is 42."
        assert page.tab.evaluate("window.drawings") < 2_000
        page.tab.click(".thought summary")
        page.wait_idle()
        length = page.tab.evaluate("document.querySelector('.thought-body').textContent.length")
        assert length > 150_000, "nothing is left out"
        box = page.tab.locator(".thought summary").bounding_box()
        assert 0 <= box["y"] < 700, "the first line is still in view"
        page.context.close()
        assert page.problems == []


@needs_browser
@pytest.mark.parametrize(
    ("time", "price"), [("16:29", "0.00069"), ("16:30", "0.00017"), ("00:29", "0.00017"), ("00:30", "0.00069")]
)
def test_price_is_lower_in_the_servers_cheap_hours(browser: Any, time: str, price: str) -> None:
    script = Script(answers=dict(ANSWERS), off_peak={"start": 990, "end": 30, "discount": 0.75})
    with serving(script) as (url, _):
        page = Page(browser, url)
        page.tab.clock.set_fixed_time(f"2025-03-01T{time}:00Z")
        page.tab.reload()
        page.tab.wait_for_selector("#model option", state="attached")
        page.ask("bare question")
        assert f"¥{price}" in page.text("#total")
        page.context.close()


@needs_browser
def test_second_turn_sends_the_first_without_its_thought_and_adds_up(page: Page, peer: tuple[str, Script]) -> None:
    page.ask("bare one")
    page.ask("sum again")
    page.ask("bare two")
    sent = peer[1].requests[-1]["messages"]
    assert [each["role"] for each in sent] == ["user", "assistant", "user", "assistant", "user"]
    assert all(set(each) == {"role", "content"} for each in sent)
    assert "First add" not in json.dumps(sent)
    assert "300 in (192 cached) · 90 out · ¥0.0021" in page.text("#total")


@needs_browser
def test_settings_reach_the_request(page: Page, peer: tuple[str, Script]) -> None:
    tab = page.tab
    tab.click("#settings-open")
    tab.locator("#temperature").fill("1.2")
    tab.fill("#max-tokens", "77")
    tab.fill("#system", "Be brief.")
    tab.fill("#key", "sk-test")
    tab.press("#key", "Tab")
    page.wait("document.getElementById('balance').textContent.includes('9.50')")
    tab.keyboard.press("Escape")
    tab.select_option("#model", "deepseek-chat")
    page.ask("bare question")
    request = peer[1].requests[-1]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("deepseek-chat", 1.2, 77)
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert peer[1].keys[-1] == "Bearer sk-test"
    tab.reload()
    tab.wait_for_selector("#model option", state="attached")
    assert tab.input_value("#model") == "deepseek-chat"
    assert "sk-test" not in tab.evaluate("JSON.stringify(localStorage)")


@needs_browser
def test_stop_ends_the_request_and_keeps_what_came(page: Page, peer: tuple[str, Script]) -> None:
    peer[1].hung_up.clear()
    page.ask("endless story", wait=False)
    page.wait("(document.querySelector('.answer')?.innerText.length ?? 0) > 20")
    assert page.tab.locator("#send").is_hidden()
    page.tab.keyboard.press("Escape")
    page.wait_idle()
    assert page.text(".note") == "You stopped this answer."
    assert "and on" in page.text(".answer")
    assert peer[1].hung_up.wait(10)  # the server learns of it
    assert page.text("#announce") == "The answer was stopped"


@needs_browser
def test_regenerate_and_edit_replace_the_last_turn(page: Page, peer: tuple[str, Script]) -> None:
    page.ask("bare question")
    before = len(peer[1].requests)
    page.tab.click(".actions .again")
    page.wait("!document.body.classList.contains('busy')")
    page.wait_idle()
    assert len(peer[1].requests) == before + 1
    assert peer[1].requests[-1]["messages"] == [{"role": "user", "content": "bare question"}]
    page.tab.hover(".user")
    page.tab.click(".user .edit")
    page.tab.fill(".editing textarea", "sum instead")
    page.tab.press(".editing textarea", "Enter")
    page.tab.wait_for_selector(".answer strong")
    page.wait_idle()
    assert peer[1].requests[-1]["messages"] == [{"role": "user", "content": "sum instead"}]
    assert page.tab.locator("article").count() == 2


@needs_browser
def test_reload_keeps_history_and_delete_can_be_undone(page: Page) -> None:
    page.ask("sum of things")
    page.tab.click("#new")
    assert page.tab.locator("#empty").is_visible()
    page.ask("bare talk")
    page.tab.reload()
    page.wait_idle()
    assert page.tab.locator("#list .open").all_inner_texts() == ["bare talk", "sum of things"]
    page.tab.click("text=sum of things")
    page.wait_idle()
    assert page.tab.locator(".answer strong").inner_text() == "42"
    assert "30 out" in page.text(".usage")

    page.tab.hover("#list li:has([aria-current])")
    page.tab.click("#list li:has([aria-current]) .edit")
    page.tab.keyboard.type("My <b>sums</b>")
    page.tab.keyboard.press("Enter")
    assert page.tab.locator("#title").inner_text() == "My <b>sums</b>"
    page.tab.hover("#list li:has([aria-current])")
    page.tab.click("#list li:has([aria-current]) .trash")
    assert page.tab.locator("#list li").count() == 1
    page.tab.click("#toast-action")
    assert page.tab.locator("#list li").count() == 2
    page.tab.reload()
    page.tab.wait_for_selector("#list li")
    assert "My <b>sums</b>" in page.tab.locator("#list .open").all_inner_texts()


@needs_browser
def test_reload_in_the_middle_keeps_what_had_come(page: Page) -> None:
    page.ask("endless story", wait=False)
    page.wait("(document.querySelector('.answer')?.innerText.length ?? 0) > 20")
    page.tab.reload()
    page.wait_idle()
    assert page.text(".user .bubble") == "endless story"
    assert "and on" in page.text(".answer")
    assert page.text(".note") == "The connection ended before the answer did."


@needs_browser
@pytest.mark.parametrize(
    ("question", "note"),
    [
        ("cut short", "The connection ended before the answer did."),
        ("midway trouble", "The server refused: engine trouble"),
    ],
)
def test_broken_answers_say_so_and_keep_their_text(page: Page, question: str, note: str) -> None:
    page.ask(question)
    assert page.text(".note") == note
    page.wait("document.querySelector('.answer').innerText.length > 5")  # drawn with the next frame
    assert "Ask again" in page.text(".actions .again")


@needs_browser
def test_a_thought_that_nothing_follows_stays_open(page: Page) -> None:
    page.ask("pondering")
    assert page.tab.locator(".thought").evaluate("node => node.open")
    page.wait("document.querySelector('.thought-body').innerText.trim() === 'Half of a thou'")


@needs_browser
def test_refusal_is_told_in_the_servers_words(browser: Any, peer: tuple[str, Script]) -> None:
    page = Page(browser, peer[0])
    page.ask("refuse me")
    assert page.text(".note") == "The server does not accept this API key (no such key). Enter one in the settings."
    page.context.close()


@needs_browser
def test_server_gone_is_told_and_the_page_recovers(browser: Any) -> None:
    script = Script(answers=dict(ANSWERS))
    with serving(script) as (url, server):
        port = server.server_address[1]
        page = Page(browser, url)
        page.ask("bare first")
    page.ask("sum later")
    assert page.text(".note").startswith("The server cannot be reached.")
    page.tab.wait_for_selector("#offline", state="visible")
    with serving(script, int(port)):
        page.tab.wait_for_selector("#offline", state="hidden")
        page.tab.click(".actions .again")
        page.tab.wait_for_selector(".answer strong")
        page.wait_idle()
        assert page.tab.locator(".note:visible").count() == 0
        page.context.close()


@needs_browser
def test_phone_width_never_scrolls_sideways(browser: Any, peer: tuple[str, Script]) -> None:
    page = Page(browser, peer[0], viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    peer[1].answers["wide"] = [
        (
            "x" * 400,
            "w" * 900
            + "\n\n```\n"
            + "c" * 500
            + "\n```\n\n$$"
            + "a+" * 200
            + "b$$\n\n|"
            + " long |" * 30
            + "\n|"
            + "---|" * 30
            + "\n",
        )
    ]
    wide = "document.documentElement.scrollWidth > innerWidth || document.getElementById('scroll').scrollWidth > innerWidth"
    assert not page.tab.evaluate(wide)
    page.ask("wide " + "q" * 300)
    assert not page.tab.evaluate(wide)
    page.tab.click("#settings-open")
    assert not page.tab.evaluate(wide)
    page.tab.keyboard.press("Escape")
    assert not page.tab.locator("#new").is_visible()
    page.tab.click("#open-menu")
    page.tab.click("#new")
    page.tab.wait_for_selector("#empty", state="visible")
    page.context.close()
    assert page.problems == []


@needs_browser
def test_a_phone_shows_tables_lists_and_counts_in_readable_lines(browser: Any, peer: tuple[str, Script]) -> None:
    """Long cells get room, a list inside of a task is further in than the task, and no break parts a number from its unit."""
    note = "a remark that is long enough to be broken into lines"
    peer[1].answers["lists"] = [
        ("", f"| prime | $p \\bmod 4$ | sum of squares | {note} |\n|--:|:-:|---|---|\n| 2 | 2 | $1^2+1^2$ | {note} |\n\n"),
        ("", "- [x] done\n  - nested\n- [ ] open\n"),
    ]
    page = Page(browser, peer[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.ask("lists in a table")
    cell = page.tab.locator(".answer th").last.bounding_box()
    assert cell["width"] > 200
    assert cell["height"] < 100
    task, nested = (page.tab.locator(f".answer li:has-text('{word}')").last.bounding_box() for word in ("done", "nested"))
    assert nested["x"] > task["x"] + 40
    page.ask("endless story", wait=False)
    page.wait("(document.querySelectorAll('.answer')[1]?.innerText.length ?? 0) > 100")
    page.tab.keyboard.press("Escape")
    page.wait_idle()
    assert re.search(r"\d\u00a0tokens/s$", page.tab.locator(".usage").last.evaluate("node => node.textContent"))
    page.context.close()
    assert page.problems == []


@needs_browser
def test_a_title_that_is_cut_says_so(page: Page) -> None:
    page.ask("bare " + "questions " * 9)
    assert page.text("#title") == "bare questions questions questions questions questions…"
    page.tab.click("#new")
    page.ask("bare question")
    assert page.text("#title") == "bare question"
    page.tab.click("#new")
    page.ask("bare " + "鲸鱼🐋" * 30)
    assert page.text("#title") == "bare " + ("鲸鱼🐋" * 30)[:55] + "…"


@needs_browser
def test_keyboard_alone_is_enough(page: Page, peer: tuple[str, Script]) -> None:
    tab = page.tab
    focused = "document.activeElement.id || document.activeElement.className"
    assert tab.evaluate(focused) == "question"  # ready to type
    tab.keyboard.type("bare first")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("second line")
    before = len(peer[1].requests)
    tab.keyboard.press("Enter")
    page.wait_idle()
    assert peer[1].requests[before]["messages"][0]["content"] == "bare first\nsecond line"
    order = []
    tab.evaluate("document.activeElement.blur()")
    visible = "['question', ''].includes(document.activeElement.id || document.activeElement.className) || " + (
        "getComputedStyle(document.activeElement).outlineStyle != 'none'"
    )
    while "question" not in order and len(order) < 20:  # the first step may lead out of the page, and back in at its top
        tab.keyboard.press("Tab")
        order.append(tab.evaluate(focused))
        assert tab.evaluate(visible), order
    reached = [
        "skip",
        "new",
        "open",
        "icon edit",
        "icon trash",
        "model",
        "export",
        "settings-open",
        "icon copy",
        "icon again",
        "question",
    ]
    places = [order.index(each) for each in reached]
    assert places == sorted(places), order
    tab.focus("#settings-open")
    tab.keyboard.press("Enter")
    assert tab.locator("#settings").is_visible()
    tab.keyboard.press("Escape")
    assert tab.evaluate(focused) == "settings-open"
    tab.focus("#list .trash")
    tab.keyboard.press("Enter")
    tab.focus("#toast-action")
    tab.keyboard.press("Enter")
    assert tab.locator("#list li").count() == 1


@needs_browser
def test_enter_that_ends_an_input_methods_choice_does_not_send(page: Page, peer: tuple[str, Script]) -> None:
    before = len(peer[1].requests)
    page.tab.fill("#question", "ni hao")
    page.tab.evaluate(
        "document.getElementById('question').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.tab.input_value("#question") == "ni hao"
    assert len(peer[1].requests) == before


@needs_browser
def test_theme_follows_the_system_until_chosen(browser: Any, peer: tuple[str, Script]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page = Page(browser, peer[0], color_scheme="dark", reduced_motion="reduce")
    dark = page.tab.evaluate(ground)
    page.tab.emulate_media(color_scheme="light")
    light = page.tab.evaluate(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(22, 25, 29)")
    page.tab.click("#settings-open")
    page.tab.select_option("#theme", "dark")
    assert page.tab.evaluate(ground) == dark
    page.tab.reload()
    page.tab.wait_for_selector("#model option", state="attached")
    assert page.tab.evaluate(ground) == dark
    assert page.tab.evaluate("getComputedStyle(document.getElementById('sidebar')).transitionDuration") in ("0s", "")
    page.context.close()


@needs_browser
def test_chinese_follows_the_browser_and_can_be_switched(browser: Any, peer: tuple[str, Script]) -> None:
    page = Page(browser, peer[0], locale="zh-CN")
    assert page.tab.get_attribute("#question", "placeholder") == "随便问点什么"
    page.ask("求和 四十 二")
    assert re.fullmatch(r"思考了 \d+\.\d 秒", page.text(".thought summary"))
    assert "输入 100（缓存命中 64）· 输出 30" in page.text("#total")
    page.tab.click("#settings-open")
    page.tab.select_option("#language", "en")
    assert page.tab.get_attribute("#question", "placeholder") == "Ask anything"
    assert page.text(".thought summary").startswith("Thought for")
    page.tab.reload()
    page.wait_idle()
    assert page.tab.get_attribute("html", "lang") == "en"
    page.context.close()


@needs_browser
def test_copy_and_export_hand_out_the_source(page: Page) -> None:
    page.ask("sum of both")
    page.tab.click(".assistant .actions .copy")
    page.tab.wait_for_selector(".actions .done")
    source = "".join(content for _, content in ANSWERS["sum"])
    assert page.tab.evaluate("navigator.clipboard.readText()") == source
    page.tab.click(".copy-code")
    page.tab.wait_for_selector(".copy-code.done")
    assert page.tab.evaluate("navigator.clipboard.readText()") == "print(40 + 2)"

    page.tab.click("#export")
    with page.tab.expect_download() as waiting:
        page.tab.click("#export-markdown")
    text = Path(waiting.value.path()).read_text()
    assert waiting.value.suggested_filename == "sum-of-both.md"
    assert text.startswith("# sum of both\n\n## You\n\nsum of both\n\n## Assistant\n\n> **Thought for")
    assert "> First add the *units*.\n\n" + source.strip() in text
    page.tab.click("#export")
    with page.tab.expect_download() as waiting:
        page.tab.click("#export-json")
    exported = json.loads(Path(waiting.value.path()).read_text())
    assert exported["messages"][1]["content"] == source
    assert exported["messages"][1]["usage"] == {"hit": 64, "miss": 36, "output": 30, "thought": 12}


@needs_browser
def test_full_storage_is_told_and_broken_entries_are_left_out(browser: Any, peer: tuple[str, Script]) -> None:
    page = Page(browser, peer[0])
    page.tab.evaluate(
        "localStorage.setItem('finback.conversation.bad', '{\"id\": 3'); localStorage.setItem('finback.settings', '[7]')"
    )
    page.tab.reload()
    page.tab.wait_for_selector("#toast", state="visible")
    assert "could not be read" in page.text("#toast-text")
    page.tab.evaluate(
        "{ for (let size = 1 << 22; size > 0; size >>= 1)"
        " try { for (let i = 0; ; i++) localStorage.setItem(`x${size}.${i}`, 'x'.repeat(size)); } catch {} }"
    )
    page.ask("sum anyway")
    assert "storage is full" in page.text("#toast-text")
    assert page.tab.locator(".answer strong").inner_text() == "42"
    page.context.close()
