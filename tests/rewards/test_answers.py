"""Where the final answer stands, what counts as the same answer, and that nothing looser is ever right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.problems import generate_problems
from finback.rewards.answers import answer_tag, boxed, exact, exact_answer_tag, exact_boxed, final_answer, same_text
from finback.rewards.reward import RewardFunction

OPENED = "What is 6 * 7?<think>\n"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>\n6 * 7 = 42\n</think>\n\n<answer>42</answer>", "42"),
        ("<think>hm</think>The answer is \\boxed{42}.", "42"),
        ("<think>hm</think>\n\nSo:\nAnswer: 42\n", "42"),
        ("<think>\n嗯\n</think>\n答案：42", "42"),
        ("<think>hm</think>最终答案是：42", "42"),
        ("<think>hm</think>**Final answer:** 42", "42"),
        ("<think>hm</think>**The final answer is: 42**", "42"),
        ("<think></think>Answer: 42", "42"),
        ("Answer: 42", "42"),
        ("<answer>\n 42 \n</answer> and so on", "42"),
        ("<answer>first</answer><answer>second</answer>", "second"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("<answer>It is \\boxed{42}</answer> not \\boxed{43}\nAnswer: 44", "42"),
        ("\\boxed{43}\nAnswer: 44", "43"),
        ("Answer: 43\nAnswer: 44", "44"),
    ],
)
def test_the_final_answer_stands_at_one_place(completion: str, answer: str) -> None:
    assert final_answer("What is 6 * 7?", completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "42",
        "The answer is 42.",
        "6 * 7 = 42",
        "<think>\n<answer>42</answer>",
        "<think>\n<answer>42</answer>\n</think>",
        "<think>\n\\boxed{42}\nAnswer: 42\n</think>\nSo it is.",
        "<think>a</think><think>b</think><answer>42</answer>",
        "hm</think><answer>42</answer>",
        "<think>a</think>b</think><answer>42</answer>",
        "<answer>42",
        "<answer>42</answer><answer>43",
        "<answer></answer>",
        "<answer> \n </answer>",
        "\\boxed{42",
        "\\boxed{42} \\boxed{4",
        "\\boxed{}",
        "\\boxed{42\\}",
        "Answer: 42\nor not",
        "Answer:",
        "My answer: 42 or 43, who knows\n",
    ],
)
def test_anything_else_is_no_answer(completion: str) -> None:
    assert final_answer("What is 6 * 7?", completion) is None
    assert exact("What is 6 * 7?", completion, {"answer": "42"}) == 0.0


def test_a_thought_that_the_prompt_opened_must_be_closed() -> None:
    assert final_answer(OPENED, "<answer>42</answer>") is None
    assert final_answer(OPENED, "6 * 7 = 42\n</think>\n<answer>42</answer>") == "42"
    assert final_answer(OPENED, "<think>\n6 * 7 = 42\n</think>\n<answer>42</answer>") == "42"
    assert final_answer(OPENED, "<answer>42</answer></think>") is None


@pytest.mark.parametrize("tail", ["", "\n</think>\n", "\n</think>\nSo that is it.", "\n</think>\n<answer>7</answer>"])
@pytest.mark.parametrize("form", ["<answer>{}</answer>", "\\boxed{{{}}}", "Answer: {}", "{}"])
def test_the_right_number_in_the_thought_earns_nothing(tail: str, form: str) -> None:
    """The hack that a verifier of the kind "the reference occurs in the text" teaches; this is why there is none here."""
    for prompt, head in ((OPENED, ""), ("What is 6 * 7?", "<think>\n")):
        completion = f"{head}{form.format('42')}{tail}"
        assert "42" in completion
        assert exact(prompt, completion, {"answer": "42"}) == 0.0


@pytest.mark.parametrize(
    "completion",
    ["42 " * 200, "<answer>42 43 44</answer>", "<answer>42</answer>" * 3 + "<answer>7</answer>", "\\boxed{42}\\boxed{7}",
     "<answer>42 or 43</answer>", "Answer: 1 2 3 42", " ".join(map(str, range(100)))],
)  # fmt: skip
def test_many_answers_are_not_the_right_one(completion: str) -> None:
    assert exact("What is 6 * 7?", f"<think>hm</think>{completion}", {"answer": "42"}) == 0.0


@pytest.mark.parametrize(
    ("expected", "given"),
    [("42", " 42 "), ("42", "42."), ("42", "$42$"), ("42", "４２"), ("1234", "1,234"),
     ("1,234,567.5", "1234567.5"), ("-1,000", "-1000"),
     ("1, 2, 3", "1,2 ,3"), ("1, 2", "1，2"), ("two words", "two \n words"), ("even", "even."), ("偶数", "偶数。"), (42, "42"),
     (0.5, "0.5"), ("10, 200", "10,200"), (".", ".")],
)  # fmt: skip
def test_the_same_answer_in_other_clothes(expected: object, given: str) -> None:
    assert exact("?", f"<answer>{given}</answer>", {"answer": expected}) == 1.0


@pytest.mark.parametrize(
    ("expected", "given"),
    [("42", "43"), ("42", "42.0"), ("42", "-42"), ("42", "4 2"), ("42", "420"), ("1234", "12,34"), ("1234", "1,2,3,4"),
     ("even", "Even"),
     ("1, 2, 3", "1, 2"), ("1, 2", "12"), ("10, 200", "10200"), ("0.5", "1/2"), ("42", "x = 42"), ("ab", "a b")],
)  # fmt: skip
def test_another_answer_is_another(expected: str, given: str) -> None:
    assert exact("?", f"<answer>{given}</answer>", {"answer": expected}) == 0.0


def test_a_list_is_no_number_with_thousands() -> None:
    assert same_text("10,200", "10200")  # as a reference this is a number
    assert not same_text("10, 200", "10200")


@pytest.mark.parametrize(
    ("function", "right", "others"),
    [
        (exact_boxed, "\\boxed{42}", ("<answer>42</answer>", "Answer: 42", "\\boxed{42")),
        (exact_answer_tag, "<answer>42</answer>", ("\\boxed{42}", "Answer: 42", "<answer>\\boxed{42}</answer>", "<answer>42")),
    ],
)
def test_strict_rewards_know_one_form(function: RewardFunction, right: str, others: tuple[str, ...]) -> None:
    assert function("?", f"<think>hm</think>{right}", {"answer": "42"}) == 1.0
    assert function("?", f"<think>{right}</think>", {"answer": "42"}) == 0.0
    assert function("?", f"<think>{right}", {"answer": "42"}) == 0.0
    for other in others:
        assert function("?", f"<think>hm</think>{other}", {"answer": "42"}) == 0.0


@pytest.mark.parametrize("example", [{}, {"answer": None}, {"answer": True}, {"answer": ["42"]}, {"answer": " "}])
def test_a_row_without_an_answer_is_told(example: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r'the row\'s "answer" is'):
        exact("?", "<answer>42</answer>", example)


def test_worked_problems_end_with_their_answers() -> None:
    """The generated problems' own layout is read back, answers in both languages, lists among them."""
    for problem in generate_problems(300, seed=5):
        head, reply = problem.text.split(problem.question, 1)
        assert exact(head + problem.question, reply.lstrip(), {"answer": problem.answer}) == 1.0
        assert exact(head + problem.question, reply.lstrip().rpartition("\n</think>")[0], {"answer": problem.answer}) == 0.0


@given(st.text(alphabet="ab{}\\", max_size=30))
def test_a_box_is_found_whatever_it_holds(inside: str) -> None:
    found = boxed(f"x \\boxed{{{inside}}}")
    depth, place = 1, 0
    while place < len(inside) and depth:  # by hand: the first place where the braces balance
        if inside[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(inside[place], 0)
        place += 1
    balanced = inside[: place - 1] if depth == 0 else inside if depth == 1 and place == len(inside) else ""
    assert found == (balanced.strip() or None)


@given(st.text(alphabet="<>/answer 4", max_size=40))
def test_a_tag_is_found_whatever_surrounds_it(text: str) -> None:
    assert answer_tag(f"{text}<answer>42</answer>") == "42"


def test_long_completions_take_no_time() -> None:
    for text in ("\\boxed{" * 100_000, "{" * 1_000_000 + "\\boxed{" + "{" * 1_000_000, "<answer>" * 100_000, "Answer: " * 100_000,
                 "**" * 500_000, "answer" + " " * 1_000_000 + "x"):  # fmt: skip
        assert exact("?", text, {"answer": "42"}) == 0.0


@pytest.mark.parametrize("space", [" ", "\n", " \n"])
def test_white_space_before_the_thought_changes_nothing(space: str) -> None:
    completion = f"{space}<think>\n9-1-4=4\n</think>\n<answer>4</answer>"
    assert exact_answer_tag("User: 9-1-4?\nAssistant:", completion, {"answer": "4"}) == 1.0
    assert exact("User: 9-1-4?\nAssistant:", completion, {"answer": "4"}) == 1.0
