"""Length, repetition, and the count of reflection words, against numbers made by hand."""

import pytest

from finback.config import InputError
from finback.rewards.length import overlong, soft_overlong, soft_short, too_short
from finback.rewards.reflection import CHINESE, ENGLISH, reflection_share, reflection_words
from finback.rewards.repetition import repeated_share, repetition


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (10_000, -1.0)]
)
def test_soft_overlong(length: float, value: float) -> None:
    assert soft_overlong(length, 100, 20) == pytest.approx(value)
    assert overlong("?", "x" * int(length), {"longest": 100, "buffer": 20}) == pytest.approx(value)


@pytest.mark.parametrize(("length", "value"), [(0, -1.0), (5, -0.5), (9, -0.1), (10, 0.0), (1000, 0.0)])
def test_soft_short(length: int, value: float) -> None:
    assert soft_short(length, 10) == pytest.approx(value)
    assert too_short("?", f"<think>{'x ' * length}</think>answer", {"shortest": 10}) == pytest.approx(value)
    assert too_short("?<think>", f"{'x ' * length}</think>answer", {"shortest": 10}) == pytest.approx(value)


def test_defaults_are_lenient() -> None:
    assert overlong("?", "x" * 6000, {}) == 0.0
    assert overlong("?", "x" * 7000, {}) == -0.5
    assert too_short("?", "<think>a thought of more than twenty letters</think>", {}) == 0.0
    assert too_short("?", "answer", {}) == -1.0


def test_lengths_that_cannot_be_are_told() -> None:
    with pytest.raises(InputError, match="buffer is 0"):
        soft_overlong(1, 10, 0)
    with pytest.raises(InputError, match="buffer is 20 and longest 10"):
        soft_overlong(1, 10, 20)
    with pytest.raises(InputError, match="shortest is 0"):
        soft_short(1, 0)
    with pytest.raises(InputError, match="\"longest\" is 'many'"):
        overlong("?", "x", {"longest": "many"})


@pytest.mark.parametrize(
    ("text", "size", "share"),
    [
        ("", 4, 0.0),
        ("a b c", 4, 0.0),
        ("a b c d e f", 4, 0.0),
        ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab: two differ
        ("a a a a a", 1, 4 / 5),
        ("加一加一加一", 2, 3 / 5),
        ("one, one, one,", 2, 3 / 5),
        ("A a A a", 2, 1 / 3),
    ],
)
def test_repeated_share(text: str, size: int, share: float) -> None:
    assert repeated_share(text, size) == pytest.approx(share)


def test_a_loop_is_punished_and_a_sum_in_steps_is_not() -> None:
    assert repetition("?", "wait, let me think again. " * 100, {}) < -0.95
    assert repetition("?", "3 + 4 = 7\n7 + 5 = 12\n12 + 9 = 21\n21 + 2 = 23", {}) == 0.0


def test_reflection_words() -> None:
    text = "Wait, WAIT. But that is an error; let me check and re-check. butter waiting checked 等等，不对，重新检查。"
    assert reflection_words(text) == {"wait": 2, "but": 1, "error": 1, "check": 2, "等等": 1, "不对": 1, "重新": 1, "检查": 1}
    assert all(reflection_words(f"so {word} it") == {word: 1} for word in ENGLISH)
    assert all(sum(reflection_words(f"我{word}了").values()) == 1 for word in CHINESE)


def test_reflection_share() -> None:
    assert reflection_share(["wait", "no", "等一下", "", "awaiting"]) == 0.4
    assert reflection_share([]) == 0.0
