"""Mathematical equality: numbers by hand, the rest by math-verify, and what must not be equal."""

from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.rewards.maths import LONGEST_ANSWER, math_equal, read_numeral
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_rewards


def equal(expected: object, given: str) -> float:
    return math_equal("?", f"<think>hm</think>\\boxed{{{given}}}", {"answer": expected})


@pytest.mark.parametrize(
    ("expected", "given"),
    [("42", "42"), ("42", "42.0"), ("42", "+42"), (42, "42."), ("42", "x = 42"), ("42", "$42$"), ("42", "042"),
     ("1234", "1,234"),
     ("-3", "−3"), ("1/2", "0.5"), ("0.5", "\\frac{1}{2}"), ("0.5", "\\dfrac12"), ("1/2", "2/4"),
     ("7/2", "3\\frac{1}{2}"), ("1/3", "0.333333"),
     ("0.333333", "1/3"), ("50%", "0.5"), ("50\\%", "1/2"), ("50%", "50"), ("0.5", "50\\%"), ("1200", "1.2 \\times 10^{3}"),
     ("0.001", "10^{-3}".replace("10", "1\\cdot 10")), ("1e3", "1000"), ("10", "10 \\text{ cm}"), ("10\\text{ cm}", "10"),
     ("10", "10 cm"),
     ("90^\\circ", "90"), ("5", "\\$5"), ("5", "5元"), ("4", "4 apples"), ("9", "9\\,\\text{m}^2")],
)  # fmt: skip
def test_numbers_that_are_equal(expected: object, given: str) -> None:
    assert equal(expected, given) == 1.0


@pytest.mark.parametrize(
    ("expected", "given"),
    [("42", "43"), ("42", "-42"), ("42", "42.0001"), ("42", "4 2"), ("42", "42, 43"), ("42", "42 or 43"), ("42", "42x"),
     ("42", "x"),
     ("46", "12 + 34"), ("42", "6 \\times 7"), ("42", "6*7"), ("42", "50 - 8"), ("42", "84/2"), ("42", "\\frac{84}{2}"),
     ("1024", "2^{10}"),
     ("2", "\\sqrt{4}"), ("120", "5!"), ("5", "5 million"), ("30000", "3万"), ("1/3", "0.33"), ("1/3", "0.3333"),
     ("0.00000001", "0"),
     ("0", "0.0000001"), ("5", "1/0"), ("5", "5/0"), ("1", "1e9999"), ("42", ""), ("42", "forty-two"), ("42", "\\text{42}")],
)  # fmt: skip
def test_numbers_that_are_not(expected: str, given: str) -> None:
    """Copying the question out of the prompt is no answer: 12 + 34 is not 46 until it is added up."""
    assert equal(expected, given) == 0.0


@pytest.mark.parametrize(
    ("expected", "given", "value"),
    [("even", "even", 1.0), ("even", "Even", 1.0), ("even", "\\text{even}", 1.0), ("\\text{even}", "even", 1.0),
     ("even", "neve", 0.0),
     ("two words", "two  words", 1.0), ("two words", "words two", 0.0), ("偶数", "偶数", 1.0), ("odd", "even", 0.0)],
)  # fmt: skip
def test_words_are_compared_as_text(expected: str, given: str, value: float) -> None:
    """math-verify reads a word as a product of its letters, which may come in any order."""
    assert equal(expected, given) == value


def test_only_the_final_answer_counts() -> None:
    assert math_equal("?", "<think>\\boxed{42}</think>It is 42.", {"answer": "42"}) == 0.0
    assert math_equal("?", "<think>\\boxed{42}", {"answer": "42"}) == 0.0
    assert math_equal("?<think>", "42</think>Answer: 42", {"answer": "42"}) == 1.0
    assert equal("42", "0" * LONGEST_ANSWER + "42") == 0.0
    assert equal("42", "0" * (LONGEST_ANSWER - 2) + "42") == 1.0


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}/{}", "\\frac{{{}}}{{{}}}", "\\dfrac {{{}}} {{{}}}"]))
def test_fractions_are_read(value: Fraction, form: str) -> None:
    sign = "-" if value < 0 else ""
    read = read_numeral(sign + form.format(abs(value.numerator), value.denominator))
    assert read is not None
    assert read.value == value
    assert read.fraction


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4))
def test_decimals_are_read(value: object) -> None:
    for text in (f"{value:f}", f"{value:,f}"):
        read = read_numeral(text)
        assert read is not None
        assert read.value == Fraction(value)


@given(st.text(alphabet="0123456789.,/+-*^{}()\\% e$x", max_size=12))
def test_what_python_reads_as_another_number_is_never_equal(text: str) -> None:
    """Whatever we read as a number and Python can evaluate, too, has the same value."""
    read = read_numeral(text)
    plain = text.strip(" $").rstrip(".").strip(" $")
    if read is None or not set(plain) <= set("0123456789.-+/e ") or not plain:
        return
    with suppress(SyntaxError, ZeroDivisionError, OverflowError):  # 007, for example
        assert float(read.value) == pytest.approx(eval(plain), rel=1e-12)


@pytest.mark.parametrize(
    "text", ["9" * 500, "1" + "," * 400, "1 " * 250, "{" * 500, "-" * 500, "1/" * 250, "a" * 499, "5 " + "ab " * 150]
)
def test_reading_a_number_takes_no_time(text: str) -> None:
    read_numeral(text)


def test_a_missing_answer_is_told() -> None:
    with pytest.raises(InputError, match='"answer"'):
        math_equal("?", "\\boxed{1}", {})


pytestmark_needs_math_verify = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@pytestmark_needs_math_verify
@pytest.mark.parametrize(
    ("expected", "given", "value"),
    [("2x+2", "2(x+1)", 1.0), ("2x+2", "2x+1", 0.0), ("\\sqrt{8}", "2\\sqrt{2}", 1.0), ("\\frac{\\pi}{2}", "\\pi/2", 1.0),
     ("\\{1,2\\}", "\\{2,1\\}", 1.0), ("\\{1,2\\}", "\\{2,3\\}", 0.0), ("[0,1)", "[0,1)", 1.0), ("[0,1)", "[0,1]", 0.0),
     ("(0,\\infty)", "x>0", 1.0), ("y=2x+1", "y=1+2x", 1.0), ("x=5", "5", 1.0), ("3,4", "5,6", 0.0), ("5x", "5y", 0.0),
     ("5x", "5", 0.0),
     ("2\\pi", "2", 0.0), ("x^2", "", 0.0), ("x^2", "}{ x^2", 0.0), ("2\\sqrt{3}\\text{ cm}", "2\\sqrt{3}", 1.0),
     ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1.0)],
)  # fmt: skip
def test_expressions_are_for_math_verify(expected: str, given: str, value: float) -> None:
    assert equal(expected, given) == value


@pytestmark_needs_math_verify
def test_a_reference_that_cannot_be_read_is_told() -> None:
    with pytest.raises(InputError, match="nothing that math-verify can read; use answers:exact"):
        equal("\\frac{", "1")


CATASTROPHES = ["10^{10^{10}}", "9^{9^{9^{9}}}", "(10^9)!", "((10^5)!)!", "\\frac{" * 60 + "1" + "}{1}" * 60,
                "(" * 100 + "x" + ")" * 100,
                "\\sqrt{" * 80 + "x" + "}" * 80, "x^{x^{x^{x^{x^{x}}}}}", "\\sum_{i=1}^{10^{12}} \\sin(i)", "\\prod_{i=1}^{10^9} i",
                "\\int_0^1 e^{e^{e^{e^x}}} dx", "(x+1)^{10^{7}}"]  # fmt: skip


@pytestmark_needs_math_verify
@pytest.mark.parametrize("cases", [CATASTROPHES[:2], pytest.param(CATASTROPHES, marks=pytest.mark.slow)], ids=["few", "all"])
def test_catastrophic_latex_ends_at_the_deadline_or_before(cases: list[str]) -> None:
    """Each scores 0, and what follows is scored right."""
    with RewardPool(load_rewards(["finback.rewards.maths:math_equal"]), processes=2, deadline=3.0, memory_bytes=2 << 30) as pool:
        for number, case in enumerate(cases):
            pool.submit(number, "?", f"\\boxed{{{case}}}", {"answer": "2x+3"})
            pool.submit((number, "good"), "?", "\\boxed{3+2x}", {"answer": "2x+3"})
        scores: dict[object, float] = {}
        while pool.outstanding:
            scores |= {key: result.total for key, result in pool.collect(wait=True)}
    assert scores == {key: value for number in range(len(cases)) for key, value in ((number, 0.0), ((number, "good"), 1.0))}
