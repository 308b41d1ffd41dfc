"""Layouts: the whole completion counts."""

import pytest

from finback.rewards.format import r1_zero_format, think_then_answer

OPENED = "Question<think>\n"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("?", "<think>a</think>b"),
        ("?", "\n<think>\na\n</think>\n\nb\n"),
        ("?", "<think>a</think><answer>b</answer>"),
        (OPENED, "a</think>b"),
        (OPENED, "<think>\na\n</think>b"),
        (OPENED.rstrip(), "\na\n</think>\n\nb"),
    ],
)
def test_a_thought_and_then_an_answer(prompt: str, completion: str) -> None:
    assert think_then_answer(prompt, completion, {}) == 1.0


WRONG = [
    ("?", ""),
    ("?", "b"),
    ("?", "<think>a"),
    ("?", "a</think>b"),
    ("?", "<think>a</think>"),
    ("?", "<think>a</think> \n"),
    ("?", "<think></think>b"),
    ("?", "<think> \n </think>b"),
    ("?", "x<think>a</think>b"),
    ("?", "<think>a</think>b</think>"),
    ("?", "<think>a</think><think>b</think>c"),
    ("?", "<think><think>a</think>b"),
    (OPENED, "a"),
    (OPENED, "</think>b"),
    (OPENED, "a</think>"),
    (OPENED, "a<think>b</think>c"),
    (OPENED, "<think><think>a</think>b"),
]


@pytest.mark.parametrize(("prompt", "completion"), WRONG)
def test_any_other_layout_is_none(prompt: str, completion: str) -> None:
    assert think_then_answer(prompt, completion, {}) == 0.0
    assert r1_zero_format(prompt, completion, {}) == 0.0


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        ("?", "<think>a</think><answer>b</answer>", 1.0),
        ("?", " <think>a</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        (OPENED, "a</think> <answer>b</answer>", 1.0),
        ("?", "<think>a</think>b", 0.0),
        ("?", "<think>a</think>so <answer>b</answer>", 0.0),
        ("?", "<think>a</think><answer>b</answer>.", 0.0),
        ("?", "<think>a</think><answer> </answer>", 0.0),
        ("?", "<think>a</think><answer>b", 0.0),
        ("?", "<think>a</think>b</answer>", 0.0),
        ("?", "<think>a</think><answer></answer>b</answer>", 0.0),
        ("?", "<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("?", "<think>a<answer>b</answer></think>", 0.0),
        ("?", "<think>a <answer> </think><answer>b</answer>", 0.0),
        ("?", "<answer>b</answer><think>a</think>", 0.0),
        (OPENED, "<answer>b</answer>", 0.0),
    ],
)
def test_the_layout_of_r1_zero(prompt: str, completion: str, value: float) -> None:
    assert r1_zero_format(prompt, completion, {}) == value
