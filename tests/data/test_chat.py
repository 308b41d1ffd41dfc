"""Chat templates: byte for byte what the published ones give."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finback.config import InputError
from finback.data.chat import published_template, render_chat

# Rendered from the tokenizer_config.json of DeepSeek-V3 and DeepSeek-R1 with jinja2 alone.
GOLDEN = json.loads((Path(__file__).parent / "chat_golden.json").read_text(encoding="utf-8"))
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['template']}: {golden['case']}")
def test_golden(golden: dict[str, Any]) -> None:
    text = render_chat(
        published_template(golden["template"]),
        golden["messages"],
        bos_token=BOS,
        eos_token=EOS,
        add_generation_prompt=golden["add_generation_prompt"],
    )
    assert text == golden["expected"]


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("deepseek_v3", "3b8267e54b67df6500f231ffa969955cc9d26b3444a291ced4eb96ca7d3ca1ea"),
        ("deepseek_r1", "563b1ce7d61d50a9b4c7439a912a1116f095b712df5b5e4d3e1116049874eb64"),
    ],
)
def test_templates_are_the_published_bytes(name: str, sha256: str) -> None:
    assert hashlib.sha256(published_template(name).encode()).hexdigest() == sha256


def test_the_known_oddities() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}

    def render(name: str, *messages: dict[str, Any]) -> str:
        return render_chat(published_template(name), messages, bos_token="", eos_token="", add_generation_prompt=True)

    def turn(calls: int) -> dict[str, Any]:
        return {"role": "assistant", "content": None, "tool_calls": [call] * calls}

    closes = [render("deepseek_v3", turn(calls)).count("<｜tool▁calls▁end｜>") for calls in (1, 2, 3)]
    assert closes == [0, 1, 2]
    assert [render("deepseek_r1", turn(calls)).count("<｜tool▁calls▁end｜>") for calls in (1, 2, 3)] == [1, 1, 1]
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    assert render("deepseek_r1", thought) == "<｜Assistant｜>\n\nyes" + EOS + "<｜Assistant｜><think>\n"
    assert render("deepseek_v3", thought) == f"<｜Assistant｜>{thought['content']}{EOS}<｜Assistant｜>"
    output = {"role": "tool", "content": "42"}
    assert render("deepseek_r1", output).endswith("42<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")


def test_json_is_not_escaped_for_html() -> None:
    text = render_chat("{{ tools | tojson }}", [], bos_token="", eos_token="", tools=[{"name": "<a> & 'b' 中"}])
    assert text == '[{"name": "<a> & \'b\' 中"}]'


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% if %}", "not valid Jinja, line 1"),
        ("{{ messages[0].content + 1 }}", "cannot render these messages"),
        ("{{ messages[0].nothing.more }}", "cannot render these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render these messages"),
        ("{{ messages.append(1) }}", "cannot render these messages"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_bad_templates_and_messages(template: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        render_chat(template, [{"role": "user", "content": "x"}], bos_token="", eos_token="")


def test_messages_that_the_published_template_cannot_take() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"not": "text"}}}
    for message in ({"role": "user"}, {"role": "assistant", "content": None, "tool_calls": [call]}):
        with pytest.raises(InputError, match="cannot render these messages"):
            render_chat(published_template("deepseek_v3"), [message], bos_token=BOS, eos_token=EOS)
    with pytest.raises(InputError, match="no published chat template 'v4'"):
        published_template("v4")
