"""The reasoning parser: every transcript gives its parts, wherever the chunk borders fall, and no character is lost."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.data.chat import published_template, render_chat
from finback.data.reasoning import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    Answer,
    Increment,
    Piece,
    ReasoningParser,
    ToolCall,
    ToolCallIncrement,
    opens_thought,
    parse_answer,
)

WEATHER = f'{CALL_BEGIN}function{CALL_SEPARATOR}get_weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}'
TIME = f"{CALL_BEGIN}function{CALL_SEPARATOR}now\n```json\n{{}}\n```{CALL_END}"
PARIS, NOW = ToolCall("get_weather", '{"city": "Paris"}'), ToolCall("now", "{}")


def answer(
    reasoning: str = "", content: str = "", *calls: ToolCall, thought: str = "absent", unfinished: str | None = None
) -> Answer:
    return Answer(reasoning, content, calls, thought, unfinished)  # type: ignore[arg-type]


# name: (the prompt opened the thought, text, what it holds)
TRANSCRIPTS: dict[str, tuple[bool, str, Answer]] = {
    "tag in the prompt": (True, "hm, 2\n</think>\n\n4", answer("hm, 2", "4", thought="closed")),
    "tag in the prompt, its newline not": (True, "\nhm\n</think>\n\n4", answer("hm", "4", thought="closed")),
    "tag in prompt and answer": (True, "<think>\nhm\n</think>\n\n4", answer("hm", "4", thought="closed")),
    "tag in the answer": (False, "<think>\nhm\n</think>\n\n4", answer("hm", "4", thought="closed")),
    "newlines before the tag": (False, "\n\n<think>hm</think>4", answer("hm", "4", thought="closed")),
    "too many newlines before the tag": (False, "\n\n\n<think>", answer("", "\n\n\n<think>")),
    "no newlines": (False, "<think>hm</think>4", answer("hm", "4", thought="closed")),
    "no tag": (False, "Hello\n\nthere", answer("", "Hello\n\nthere")),
    "nothing": (False, "", answer()),
    "only newlines": (False, "\n\n", answer("", "\n\n")),
    "nothing of a thought": (True, "", answer(thought="open", unfinished="reasoning")),
    "white space is kept": (True, "\n\n a \n\n</think>\n\n\n b \n", answer("\n a \n", "\n b \n", thought="closed")),
    "unclosed tag in the prompt": (True, "hm, 2 and\n", answer("hm, 2 and\n", thought="open", unfinished="reasoning")),
    "unclosed tag": (False, "<think>\nhm </thin", answer("hm </thin", thought="open", unfinished="reasoning")),
    "empty thought": (False, "<think>\n\n</think>\n\n4", answer("", "4", thought="closed")),
    "empty thought, tag in the prompt": (True, "\n</think>\n\n4", answer("", "4", thought="closed")),
    "emptiest thought": (False, "<think></think>", answer(thought="closed")),
    "thought without content": (True, "hm\n</think>\n", answer("hm", thought="closed")),
    "end tag without a thought": (False, "a\n</think>\n\nb", answer("", "a\n</think>\n\nb")),
    "end tag first": (False, "</think>b", answer("", "</think>b")),
    "second thought is content": (True, "a</think>\nb<think>c</think>d", answer("a", "b<think>c</think>d", thought="closed")),
    "tag after text is content": (False, "a <think>b</think>", answer("", "a <think>b</think>")),
    "tag inside the thought": (False, "<think>a<think>b</think>c", answer("a<think>b", "c", thought="closed")),
    "half tags": (True, "a</thin</think>b<｜tool▁calls", answer("a</thin", "b<｜tool▁calls", thought="closed")),
    "other end": (True, "a\n\n</think\n>\n</think>", answer("a\n\n</think\n>", thought="closed")),
    "V3: one call, unclosed": (False, CALLS_BEGIN + WEATHER, answer("", "", PARIS)),
    "V3: two calls": (False, f"{CALLS_BEGIN}{WEATHER}\n{TIME}{CALLS_END}", answer("", "", PARIS, NOW)),
    "R1: one call, closed": (False, CALLS_BEGIN + WEATHER + CALLS_END, answer("", "", PARIS)),
    "R1: content before the call": (False, f"See:{CALLS_BEGIN}{WEATHER}{CALLS_END}", answer("", "See:", PARIS)),
    "calls after a thought": (
        True,
        f"hm\n</think>\n\n{CALLS_BEGIN}{WEATHER}\n{TIME}{CALLS_END}",
        answer("hm", "", PARIS, NOW, thought="closed"),
    ),
    "a later turn of calls": (False, f"\n{WEATHER}{CALLS_END}", answer("", "", PARIS)),
    "a call without the list": (False, f"a{WEATHER}b", answer("", "ab", PARIS)),
    "newlines inside the list": (False, f"{CALLS_BEGIN}\n{WEATHER}\n{CALLS_END}", answer("", "", PARIS)),
    "text behind the list": (False, f"{CALLS_BEGIN}{WEATHER}{CALLS_END}\nb", answer("", "\nb", PARIS)),
    "two lists": (False, f"{CALLS_BEGIN}{WEATHER}{CALLS_END}, {CALLS_BEGIN}{TIME}{CALLS_END}", answer("", ", ", PARIS, NOW)),
    "calls inside a thought": (True, f"a{CALLS_BEGIN}{TIME}</think>b", answer(f"a{CALLS_BEGIN}{TIME}", "b", thought="closed")),
    "no closing fence": (False, WEATHER.replace("\n```<", "<"), answer("", "", PARIS)),
    "fence on the last line": (False, WEATHER.replace("\n```<", "```<"), answer("", "", PARIS)),
    "fences in the arguments": (
        False,
        WEATHER.replace("Paris", "\n```\n```json\n"),
        answer("", "", ToolCall("get_weather", '{"city": "\n```\n```json\n"}')),
    ),
    "arguments that are no JSON": (False, WEATHER.replace("{", ""), answer("", "", ToolCall("get_weather", '"city": "Paris"}'))),
    "no arguments": (False, WEATHER.replace('{"city": "Paris"}', ""), answer("", "", ToolCall("get_weather", ""))),
    "another type": (False, WEATHER.replace("function", "code"), answer("", "", PARIS)),
    "cut in the arguments": (
        False,
        CALLS_BEGIN + WEATHER.partition("is")[0],
        answer("", "", ToolCall("get_weather", '{"city": "Par'), unfinished="tool_call"),
    ),
    "cut behind the fence": (False, WEATHER.removesuffix(CALL_END), answer("", "", PARIS, unfinished="tool_call")),
    "cut in the name": (False, WEATHER.partition("_weather")[0], answer("", WEATHER.partition("_weather")[0])),
    "malformed: no separator": (False, WEATHER.replace(CALL_SEPARATOR, " "), answer("", WEATHER.replace(CALL_SEPARATOR, " "))),
    "malformed: no name": (False, WEATHER.replace("get_weather", ""), answer("", WEATHER.replace("get_weather", ""))),
    "malformed: no fence": (False, WEATHER.replace("```json", ""), answer("", WEATHER.replace("```json", ""))),
    "malformed: endless name": (False, WEATHER.replace("weather", "w" * 500), answer("", WEATHER.replace("weather", "w" * 500))),
    "malformed: empty list": (False, f"a{CALLS_BEGIN}{CALLS_END}b", answer("", f"a{CALLS_BEGIN}{CALLS_END}b")),
    "malformed, then a call": (False, f"{CALLS_BEGIN}{CALL_BEGIN}{WEATHER}", answer("", CALLS_BEGIN + CALL_BEGIN, PARIS)),
    "a call, then malformed": (False, f"{WEATHER}\n{CALL_BEGIN}oops", answer("", f"\n{CALL_BEGIN}oops", PARIS)),
}  # fmt: skip
cases = pytest.mark.parametrize(("starts_in_thought", "text", "expected"), TRANSCRIPTS.values(), ids=list(TRANSCRIPTS))

MARKUP = {"<think>", "</think>", "\n", CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR, "```", "```json"}


def assembled(parser: ReasoningParser, chunks: list[str]) -> Answer:
    """The answer that the increments of `chunks` add up to."""
    reasoning = content = ""
    calls: list[ToolCall] = []
    for increment in [*map(parser.feed, chunks), parser.finish()]:
        reasoning += increment.reasoning
        content += increment.content
        for call in increment.tool_calls:
            if call.name:
                assert call.index == len(calls)
                calls.append(ToolCall(call.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + call.arguments)
    return Answer(reasoning, content, tuple(calls), parser.thought, parser.unfinished)


def pieces(starts_in_thought: bool, chunks: list[str]) -> list[Piece]:
    parser = ReasoningParser(starts_in_thought=starts_in_thought)
    return [piece for chunk in chunks for piece in parser.split(chunk)] + parser.split_end()


@cases
def test_transcript(starts_in_thought: bool, text: str, expected: Answer) -> None:
    assert parse_answer(text, starts_in_thought=starts_in_thought) == expected


@cases
def test_every_split_point(starts_in_thought: bool, text: str, expected: Answer) -> None:
    for place in range(len(text) + 1):
        parser = ReasoningParser(starts_in_thought=starts_in_thought)
        assert assembled(parser, [text[:place], text[place:]]) == expected, f"split at {place}"
        assert "".join(piece.text for piece in pieces(starts_in_thought, [text[:place], text[place:]])) == text
    assert assembled(ReasoningParser(starts_in_thought=starts_in_thought), list(text)) == expected


FRAGMENTS = ["<think>", "</think>", "\n", "\n\n", "a", "狐 b", "{}", "```", "\n```json\n", "<", "｜tool▁", CALLS_BEGIN, CALLS_END]
FRAGMENTS += [CALL_BEGIN, CALL_END, CALL_SEPARATOR, "function", WEATHER, TIME, "</thi", "nk>", "x" * 140]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@given(st.booleans(), texts, st.data())
def test_any_chunks_of_any_text(starts_in_thought: bool, text: str, data: st.DataObject) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[start:end] for start, end in zip([0, *borders], [*borders, len(text)], strict=True)]
    found = pieces(starts_in_thought, chunks)
    # Nothing is lost or doubled, and only tags (with their newlines, fences and a call's type) are taken out.
    assert "".join(piece.text for piece in found) == text
    whole = parse_answer(text, starts_in_thought=starts_in_thought)
    for kind in ("reasoning", "content"):
        assert "".join(piece.text for piece in found if piece.kind == kind) == getattr(whole, kind)
    assert assembled(ReasoningParser(starts_in_thought=starts_in_thought), chunks) == whole
    assert assembled(ReasoningParser(starts_in_thought=starts_in_thought), list(text)) == whole
    markup = "".join(piece.text for piece in found if piece.kind == "markup")
    heads = markup.split(CALL_BEGIN)
    for rest in [heads[0], *(head.partition(CALL_SEPARATOR)[2] for head in heads[1:])]:
        for tag in sorted(MARKUP, key=len, reverse=True):
            rest = rest.replace(tag, "")
        assert rest == "" or whole.unfinished == "tool_call"


words = st.text(st.characters(exclude_characters="\n<｜`", codec="utf-8"), min_size=1)


@given(words, words, st.booleans(), st.lists(st.tuples(words.filter(lambda w: len(w) <= 64), words), max_size=3))
def test_the_layout_comes_apart_into_what_it_was_made_of(
    reasoning: str, content: str, in_prompt: bool, calls: list[tuple[str, str]]
) -> None:
    text = f"{'' if in_prompt else '<think>' + chr(10)}{reasoning}\n</think>\n\n{content}"
    parts = [f"{CALL_BEGIN}function{CALL_SEPARATOR}{name}\n```json\n{value}\n```{CALL_END}" for name, value in calls]
    text += CALLS_BEGIN + "\n".join(parts) + CALLS_END if parts else ""
    expected = answer(reasoning, content, *(ToolCall(*call) for call in calls), thought="closed")
    assert parse_answer(text, starts_in_thought=in_prompt) == expected


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_r1"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_inverse_of_the_published_templates(name: str, calls: int) -> None:
    call = {
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps({"city": "巴黎"}, ensure_ascii=False)},
    }
    turn: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call] * calls}
    if not calls:
        turn = {"role": "assistant", "content": "Sunny.\n\n晴"}
    text = render_chat(published_template(name), [{"role": "user", "content": "?"}, turn], bos_token="", eos_token="")
    said = text.removeprefix("<｜User｜>?<｜Assistant｜>").removesuffix("<｜end▁of▁sentence｜>")
    expected = answer("", turn["content"] or "", *[ToolCall("get_weather", '{"city": "巴黎"}')] * calls)
    assert parse_answer(said) == expected


@pytest.mark.parametrize(("name", "expected"), [("deepseek_v3", False), ("deepseek_r1", True)])
def test_the_prompt_says_whether_it_opens_the_thought(name: str, expected: bool) -> None:
    prompt = render_chat(
        published_template(name), [{"role": "user", "content": "?"}], bos_token="", eos_token="", add_generation_prompt=True
    )
    assert opens_thought(prompt) == expected
    assert opens_thought("<think>\n")
    assert not opens_thought("<think>\n\n</think>\n\n")


def test_text_streams_as_soon_as_it_is_certain() -> None:
    parser = ReasoningParser()
    assert [parser.feed(piece) for piece in ("<thi", "nk>\nh", "m\n", "\n</th")] == [
        Increment(),
        Increment("h"),
        Increment("m"),  # its newline may belong to the tag
        Increment("\n"),
    ]
    assert parser.unfinished == "reasoning"
    assert parser.feed("ink>\n\nab<") == Increment("", "ab")
    assert parser.thought == "closed"
    assert parser.feed("b>") == Increment("", "<b>")
    assert parser.feed(f"{CALLS_BEGIN}{CALL_BEGIN}function{CALL_SEPARATOR}get") == Increment()
    assert parser.feed("_weather\n```json\n") == Increment("", "", (ToolCallIncrement(0, "get_weather", ""),))
    assert parser.feed('{"city"') == Increment("", "", (ToolCallIncrement(0, "", '{"city"'),))
    assert parser.unfinished == "tool_call"
    assert parser.feed(f": 1}}\n```{CALL_END}\n{TIME[:-5]}") == Increment(
        "", "", (ToolCallIncrement(0, "", ": 1}"), ToolCallIncrement(1, "now", "{}"))
    )
    assert parser.feed(TIME[-5:]) == parser.finish() == Increment()
    assert parser.unfinished is None


@given(st.booleans(), texts)
def test_without_tools_every_tool_tag_is_content(starts_in_thought: bool, text: str) -> None:
    found = parse_answer(text, starts_in_thought=starts_in_thought, tools=False)
    parser = ReasoningParser(starts_in_thought=starts_in_thought, tools=False)
    assert assembled(parser, list(text)) == found
    assert found.tool_calls == ()
    for tag in (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR):
        assert (found.reasoning + "|" + found.content).count(tag) == text.count(tag)


@given(st.booleans(), texts)
def test_what_is_held_back_is_bounded(starts_in_thought: bool, text: str) -> None:
    parser = ReasoningParser(starts_in_thought=starts_in_thought)
    given_out = 0
    for place, character in enumerate(text, 1):
        given_out += sum(len(piece.text) for piece in parser.split(character))
        assert place - given_out <= 400
