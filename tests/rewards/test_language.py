"""Counting words by language, and R1's consistency reward."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.problems import generate_problems
from finback.rewards.language import language_consistency, languages, mixing, mixing_rate


@pytest.mark.parametrize(
    ("text", "zh", "en", "other"),
    [
        ("", 0, 0, 0),
        ("First we add the numbers.", 0, 5, 0),
        ("我们先把数加起来。", 8, 0, 0),
        ("先算 then 再加 them up", 4, 3, 0),
        ("3 + 4 = 7, x = 2y, f(x) = 12%", 0, 0, 0),
        ("so sin(x) is log 2 or max(a, b)", 0, 3, 0),
        ("$\\frac{alpha}{beta}$ is \\(the answer\\) of \\[some text\\] $$more text$$", 0, 2, 0),
        ("\\frac{12}{34} and \\alpha", 0, 1, 0),
        ("see `some_code(here)` and\n```python\nprint(hello)\n```\ndone", 0, 3, 0),
        ("<think>\nwell\n</think> <answer>", 0, 1, 0),
        ("don't isn’t it's", 0, 3, 0),
        ("ab12cd", 0, 2, 0),
        ("naïve café Größe", 0, 0, 3),
        ("русский текст", 0, 0, 2),
        ("ひらがな", 0, 0, 4),
        ("日本語のテキスト", 3, 0, 5),
        ("한국어 텍스트", 0, 0, 2),
        ("A I x 中", 1, 0, 0),
        ("用Python写", 2, 1, 0),
        ("that costs $5 and then $6 more", 0, 3, 0),
        ("𠀀𠀁", 2, 0, 0),
    ],
)
def test_words_are_counted_by_the_rule(text: str, zh: int, en: int, other: int) -> None:
    assert languages(text) == {"zh": zh, "en": en, "other": other}


@pytest.mark.parametrize(
    ("prompt", "completion", "example", "value"),
    [
        ("?", "<think>we add them up</think>42", {"language": "en"}, 1.0),
        ("?", "<think>we add them up</think>42", {"language": "zh"}, 0.0),
        ("?", "<think>先 add 再 up</think>", {"language": "zh"}, 0.5),
        ("How many are there?", "<think>先加 up</think>他们有四个", {}, 1 / 3),
        ("有多少个？", "<think>先加 up</think>that is all of it", {}, 2 / 3),
        ("有多少个 apples?<think>\n", "先加起来\n</think>ok", {}, 1.0),
        ("?", "<think>we add</think>", {"language": None} | {"language": "en"}, 1.0),
        ("?", "<think>we add 加", {"language": "en"}, 2 / 3),
        ("?", "<think>3 + 4 = 7</think>7", {"language": "en"}, 1.0),
        ("?", "<think></think>seven", {"language": "en"}, 0.0),
        ("?", "<think> \n</think>seven", {"language": "en"}, 0.0),
        ("?", "seven", {"language": "en"}, 0.0),
        ("", "<think>wir addieren für русский</think>", {"language": "en"}, 0.5),
    ],
)
def test_consistency_is_the_share_of_the_thought_in_the_target_language(
    prompt: str, completion: str, example: dict[str, str], value: float
) -> None:
    assert language_consistency(prompt, completion, example) == pytest.approx(value)


def test_another_language_in_the_row_is_a_mistake() -> None:
    with pytest.raises(InputError, match="is 'fr', it must be"):
        language_consistency("3 + 4 = ?", "<think>we add</think>7", {"language": "fr"})


TEMPLATED = "The User asks a question and the Assistant solves it in its mind.\nUser: {}\nAssistant:"


@pytest.mark.parametrize(
    ("asked", "thought", "value"),
    [
        ("三加四是多少？", "先加起来", 1.0),
        ("三加四是多少？", "we add them", 0.0),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "三加四是多少？"}], "先 add", 0.5),
        ("3 + 4 = ?", "we add them", 1.0),  # no words to tell a language by: any one language is consistent
        ("3 + 4 = ?", "先加起来", 1.0),
        ("3 + 4 = ?", "先加 then add", 0.5),
        ("3 + 4 = ?", "7", 1.0),
        ("3 + 4 = ?", "", 0.0),
    ],
)
def test_the_target_is_the_language_of_the_question_and_not_of_its_template(asked: object, thought: str, value: float) -> None:
    prompt = TEMPLATED.format(asked if isinstance(asked, str) else "三加四是多少？")
    assert language_consistency(prompt, f"<think>{thought}</think>7", {"prompt": asked}) == value


def test_a_wordless_prompt_alone_asks_for_any_one_language() -> None:
    assert language_consistency("3 + 4 = ?", "<think>we add 加</think>7", {}) == pytest.approx(2 / 3)


def test_generated_problems_are_in_their_languages() -> None:
    for problem in generate_problems(200, seed=2):
        counts = languages(problem.question)
        assert max(counts, key=lambda language: counts[language]) == problem.language or problem.family in (
            "letter_counting",
            "reversal",
        )
        assert language_consistency("", f"<think>{problem.reasoning}</think>", {"language": problem.language}) >= 0.8


@pytest.mark.parametrize(
    ("text", "mixed"),
    [("", False), ("all in English here", False), ("全部都是中文", False), ("单词apple里有几个字母", False),
     ("先算 the sum 再说", True), ("we add 加起来 and so on", True),
     ("十" * 30 + " two words", False), ("a b c 加", False), ("one 二", False)],
)  # fmt: skip
def test_mixing(text: str, mixed: bool) -> None:
    assert mixing(text) is mixed


def test_the_rate_of_mixing() -> None:
    assert mixing_rate(["先算 the sum 再说", "fine words", "好的", "we add 加起来 and so on"]) == 0.5
    assert mixing_rate([]) == 0.0


@given(st.text(alphabet="ab 中文яに$`\\<>12'", max_size=60))
def test_every_text_has_a_count(text: str) -> None:
    assert all(count >= 0 for count in languages(text).values())


def test_long_texts_take_no_time() -> None:
    for text in (
        "$" * 300_000,
        "`" * 300_000,
        "<" * 300_000,
        "\\[" * 150_000,
        "a'" * 150_000,
        "```" * 100_000,
        "中a" * 150_000,
        "$$a" * 100_000,
    ):
        languages(text)


def test_a_space_before_the_thought_hides_no_words_of_it() -> None:
    """Behind "Assistant:" a model writes a space first."""
    completion = " <think>\nfirst 9+5\nthen 14\n</think>\n<answer>14</answer>"
    assert language_consistency("User: 4+5+5?\nAssistant:", completion, {"language": "en"}) == 1.0
    assert language_consistency("User: 4+5+5?\nAssistant:", completion, {"language": "zh"}) == 0.0
