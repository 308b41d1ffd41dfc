"""What of a conversation enters the prompt."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.data.tokenizer import Tokenizer
from finback.server.prompt import Prompt, chat_prompt
from tests.server.serving import tiny_model

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Where does the whale swim?"}]
TOKENIZERS = {name: tiny_model(name)[1] for name in ("deepseek_v3", "deepseek_r1")}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def with_answer(tokenizer: Tokenizer, content: Any) -> str:
    """The prompt in which `content` is an earlier answer."""
    messages = [*QUESTION, {"role": "assistant", "content": content}, *QUESTION]
    return chat_prompt(tokenizer, messages, thinking=None).text


texts = st.sampled_from(["S", "S\n", "\n\nS", " ", ""])


def thoughts(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(inner | inner.map(lambda text: f"<think>{text}</think>"), max_size=4).map("".join)


nested = st.recursive(texts, thoughts, max_leaves=8)


@given(
    first=nested.map(lambda text: f"{text}</think>\n\n") | st.just(""),
    others=st.lists(nested.map(lambda text: f"<think>{text}</think>"), max_size=3).map("\n".join),
    cut=texts.map(lambda text: f"<think>{text}") | st.just(""),
)
def test_no_nesting_of_thoughts_leaves_a_tag_or_a_word_of_them(first: str, others: str, cut: str) -> None:
    """The first thought may lack the tag that opens it, the last one that closes it."""
    for tokenizer in TOKENIZERS.values():
        assert with_answer(tokenizer, f"{first}{others}A{cut}") == with_answer(tokenizer, "A")
        assert with_answer(tokenizer, f"{first}{others}{cut}") == with_answer(tokenizer, "")


@pytest.mark.parametrize("content", ["<think>S1</think>\n<think>S2</think>\nA", "<think>a<think>b</think>c</think>A"])
def test_thoughts_in_a_row_and_in_each_other_are_dropped(tokenizer: Tokenizer, content: str) -> None:
    assert with_answer(tokenizer, content) == with_answer(tokenizer, "A")
    parts = [{"type": "text", "text": content[:9]}, {"type": "text", "text": content[9:]}]
    assert with_answer(tokenizer, parts) == with_answer(tokenizer, "A")


@pytest.mark.parametrize("thinking", [None, False, True])
def test_a_prefix_that_opens_a_thought_is_continued_inside_it(tokenizer: Tokenizer, thinking: bool | None) -> None:
    def prompt(prefix: Any) -> Prompt:
        messages = [*QUESTION, {"role": "assistant", "content": prefix, "prefix": True}]
        return chat_prompt(tokenizer, messages, thinking=thinking)

    thinker = chat_prompt(tokenizer, QUESTION, thinking=True).text
    assert thinker.endswith("<think>\n")
    for prefix in ("<think>", "<think>\n", "\n<think>\n", [{"type": "text", "text": "<think>\n"}]):
        assert prompt(prefix) == (thinker, True, False)
    assert prompt("<think>\nLet me") == prompt("<think>Let me") == (f"{thinker}Let me", True, True)
    assert prompt("<think>\nwest")[0] != prompt("<think>\nwest</think>")[0]
    closed = prompt("<think>\nwest\n</think>\n\nNorth")
    assert closed == prompt("North")
    assert closed[0].endswith("North")
    assert not closed[1]
