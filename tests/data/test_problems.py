"""The built-in problems: their answers and every step of their working are right, and the held-out ones stay out."""

import hashlib
import re
from collections import Counter

import pytest

from finback.config import InputError
from finback.data.problems import (
    FAMILIES,
    Problem,
    family_names,
    generate_problems,
    is_held_out,
    problem_documents,
)

PROBLEMS = list(generate_problems(4000, seed=11))


def _of(*families: str) -> list[Problem]:
    return [problem for problem in PROBLEMS if problem.family in families]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_every_family_comes_in_both_languages() -> None:
    counts = Counter((problem.family, problem.language) for problem in PROBLEMS)
    assert set(counts) == {(family, language) for family in family_names() for language in ("en", "zh")}
    assert min(counts.values()) > 100
    assert len(FAMILIES) >= 11
    for problem in PROBLEMS:
        chinese = any("一" <= char <= "龥" for char in problem.question)
        assert chinese == (problem.language == "zh")
        assert problem.reasoning
        assert problem.answer


def test_every_step_of_arithmetic_is_right() -> None:
    checked = 0
    for problem in PROBLEMS:
        for line in problem.reasoning.splitlines():
            for left, right in re.findall(r"^(?:\D*: ?|个位：)?([\d +\-*/]+) = ([\d +]+)$", line):
                assert eval(left) == eval(right), problem  # digits and signs only
                checked += 1
    assert checked > 4000


def test_chains_and_products_have_the_right_answer() -> None:
    for problem in _of("addition", "subtraction", "mixed_chain", "multiplication"):
        expression = re.search(r"\d+(?: [+\-*] \d+)+", problem.question)
        numbers = _numbers(problem.question)
        expected = eval(expression[0]) if expression else numbers[0] * numbers[1]
        assert problem.answer == str(expected)
        assert expected >= 0
        assert problem.reasoning.rstrip().endswith(f"= {expected}")


def test_comparison_and_sorting() -> None:
    for problem in _of("comparison"):
        largest = "largest" in problem.question or "最大" in problem.question
        assert problem.answer == str((max if largest else min)(_numbers(problem.question)))
        for line in problem.reasoning.splitlines():
            left, sign, right, kept = re.fullmatch(r"(\d+) ([<>=]) (\d+)\D+(\d+)", line).groups()  # type: ignore[union-attr]
            assert eval(f"{left} {sign.replace('=', '==')} {right}")
            assert kept == str((max if largest else min)(int(left), int(right)))
        assert problem.reasoning.endswith(problem.answer)
    for problem in _of("sorting"):
        rising = "small to large" in problem.question or "从小到大" in problem.question
        expected = sorted(_numbers(problem.question), reverse=not rising)
        assert problem.answer == ", ".join(map(str, expected))
        assert [_numbers(line)[0] for line in problem.reasoning.splitlines()] == expected


def test_letters() -> None:
    for problem in _of("letter_counting"):
        english = re.search(r"letter (\w) occur in the word (\w+)\?", problem.question)
        chinese = re.search(r"单词([a-z]+)里有几个字母([a-z])", problem.question)
        letter, word = english.groups() if english else (chinese[2], chinese[1])  # type: ignore[index]
        assert problem.answer == str(word.count(letter))
        assert [line.split()[0] for line in problem.reasoning.splitlines()] == list(word)
        assert problem.reasoning.split()[-1] == problem.answer
    for problem in _of("reversal"):
        word = re.search(r"word (\w+)|把([a-z]+)", problem.question)
        assert problem.answer == (word[1] or word[2])[::-1]  # type: ignore[index]
        assert problem.reasoning.splitlines()[1].replace(" ", "") == problem.answer


def test_stories_sequences_and_parity() -> None:
    for problem in _of("word_problem"):
        numbers, question = _numbers(problem.question), problem.question
        if "gives it" in question or "又给了" in question:
            expected = numbers[0] + numbers[1]
        elif "are left" in question or "还剩" in question:
            expected = numbers[0] - numbers[1]
        elif "bags" in question or "袋" in question:
            expected = numbers[0] * numbers[1] + numbers[2]
        else:
            expected, rest = divmod(numbers[0], numbers[1])
            assert rest == 0
        assert problem.answer == str(expected)
    for problem in _of("sequence"):
        first, second, third, fourth = _numbers(problem.question)
        rule = fourth * 2 if second == 2 * first and third == 2 * second and fourth == 2 * third else 2 * fourth - third
        assert problem.answer == str(rule)
    for problem in _of("parity"):
        even = sum(_numbers(problem.question)) % 2 == 0
        assert problem.answer in (("even", "偶数") if even else ("odd", "奇数"))


def test_held_out_questions_never_come_in_training() -> None:
    held_out = list(generate_problems(500, seed=11, held_out=True))
    questions = {problem.question for problem in held_out}
    assert all(is_held_out(question) for question in questions)
    assert not questions & {problem.question for problem in generate_problems(20000, seed=12)}
    assert not any(is_held_out(problem.question) for problem in PROBLEMS)
    share = sum(is_held_out(f"What is {a} + {b}?") for a in range(80) for b in range(80)) / 6400
    assert 0.04 < share < 0.06


def test_other_words_for_the_same_numbers_are_held_out_together() -> None:
    for a in range(200):
        forms = [f"What is {a} + 7?", f"what  is {a} + 7 ?", f"Calculate {a} + 7.", f"计算{a} + 7。", f"{a}＋７等于多少？"]
        assert len({is_held_out(form) for form in forms}) == 1
    words = [is_held_out(f"Spell the word {chr(97 + i)}{chr(97 + j)} backwards.") for i in range(26) for j in range(26)]
    assert 0.02 < sum(words) / len(words) < 0.09


def test_same_arguments_same_problems_everywhere() -> None:
    assert PROBLEMS[:100] == list(generate_problems(100, seed=11))
    assert PROBLEMS[:50] != list(generate_problems(50, seed=12))
    # Pinned over Python versions: a change would move problems between what was trained on and what is measured.
    text = "".join(problem.text for problem in PROBLEMS[:500])
    assert hashlib.sha256(text.encode()).hexdigest() == "b1c5a0b21a33d682b1350aa23a61def40d41eb93c8e473f699415b7a45a6913c"


def test_choices_narrow_what_comes() -> None:
    problems = list(generate_problems(200, families=["addition", "parity"], languages=["en"], levels=[1]))
    assert {problem.family for problem in problems} == {"addition", "parity"}
    assert {problem.language for problem in problems} == {"en"}
    assert max(max(_numbers(problem.question)) for problem in problems) <= 9
    documents = list(problem_documents(3, seed=4, families=["sorting"]))
    assert [document.source for document in documents] == ["problems/sorting"] * 3


def test_text_form() -> None:
    assert Problem("1 + 2?", "1 + 2 = 3", "3", "x").text == "Question: 1 + 2?\n<think>\n1 + 2 = 3\n</think>\nAnswer: 3\n"
    assert Problem("1 + 2？", "", "3", "x", "zh").text == "问题：1 + 2？\n答案：3\n"


def test_mistakes() -> None:
    with pytest.raises(InputError, match="no problem family 'adition'; did you mean 'addition'"):
        next(generate_problems(1, families=["adition"]))
    with pytest.raises(InputError, match="at least one problem family"):
        next(generate_problems(1, families=[]))
    with pytest.raises(InputError, match=r"languages are \['fr'\]"):
        next(generate_problems(1, languages=["fr"]))
    with pytest.raises(InputError, match=r"levels are \[4\]"):
        next(generate_problems(1, levels=[4]))
