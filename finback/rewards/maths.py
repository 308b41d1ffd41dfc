"""Mathematical equality of answers: numbers by our own exact arithmetic, everything else by math-verify (extra `rl`).

A reference that is a number wants an answer that is worked out. math-verify alone takes "12 + 34" for 46, so a model that copies the
question out of its prompt is always right; here a sum, product or root is no number, and a fraction is none where an integer is asked.

math-verify's own timeouts are off: they are signals, which need the main thread and do not interrupt sympy's long calls in C. What
never ends (towers of powers, factorials) is for the deadline of `finback.rewards.pool.RewardPool`; call `math_equal` on text that a
model wrote nowhere else.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from finback.config import InputError
from finback.rewards.answers import final_answer, reference, same_text
from finback.rewards.reward import Example

LONGEST_ANSWER = 500  # characters; nothing that is an answer is longer
TOLERANCE = Fraction(1, 1_000_000)  # of a decimal beside a fraction, as in math-verify

_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_POWER = r"[-+]?\d{1,3}"
_NUMERAL = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?\\[dt]?frac\s*(?:{{\s*(?P<over>\d+)\s*}}\s*{{\s*(?P<under>\d+)\s*}}|(?P<one>\d)(?P<other>\d))"
    rf"|(?P<number>{_DIGITS})"
    rf"(?:\s*/\s*(?P<by>\d+)|\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*{{?\s*(?P<power>{_POWER})\s*}}?|[eE](?P<exponent>{_POWER}))?"
    rf")(?:\s*(?P<percent>\\?%))?(?P<unit>.*)",
    re.DOTALL,
)
_SQUARE = r"(?:[²³]|\s*\^\s*\{?[23]\}?)?"
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{([^{}]*)\}")
_TEXT_UNIT = re.compile(rf"{_TEXT.pattern}{_SQUARE}\Z")
_UNIT = re.compile(  # single letters are variables: 5x is no number
    rf"\s*(?:\^?\s*\\circ|\^?\{{\s*\\circ\s*\}}|°)[CF]?|\s*\\?[$€£¥]|\s*[\u4e00-\u9fff]+"
    rf"|\s*(?:[kcm]m|[km]g|m[lL]){_SQUARE}|(?:\s+(?:[^\W\d_]{{2,}}|[a-zA-Z]+/[a-zA-Z]+){_SQUARE})*\s*"
)
_NO_UNITS = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "pi", "or", "and", "to", "mod", "squared", "cubed"}
_NO_UNITS |= set("十百千万亿")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|~")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-][^\W\d_]+)*")


@dataclass(frozen=True)
class Numeral:
    """A number as it is written."""

    value: Fraction
    fraction: bool
    """Written with a fraction bar."""
    decimal: bool
    percent: bool


def math_equal(prompt: str, completion: str, example: Example) -> float:
    """1 if the final answer is mathematically equal to the row's "answer", else 0; needs the extra `rl`.

    The answer stands where `finback.rewards.answers.final_answer` finds it, and has at most 500 characters. Where the reference is a
    number, the answer must be one: integer, decimal, fraction, percentage (50% is 0.5, and 50), scientific notation; units and "x = "
    do not count. Where the reference is a word, they are compared as text without case. Anything else is math-verify's: expressions,
    equations, intervals, sets (a list is one, in any order: use `exact` for orders), tuples, matrices, in LaTeX or plain.
    """
    expected = reference(example)
    given = final_answer(prompt, completion)
    if given is None or len(given) > LONGEST_ANSWER:
        return 0.0
    if same_text(expected, given):
        return 1.0
    number = read_numeral(expected)
    if number is not None:
        other = read_numeral(given)
        return float(other is not None and same_number(number, other))
    if _WORDS.fullmatch(_TEXT.sub(r"\1", expected).strip()):
        return float(same_text(_TEXT.sub(r"\1", expected).casefold(), _TEXT.sub(r"\1", given).casefold()))
    return float(_math_verify()(expected, given))


def prepare() -> None:
    """Import math-verify and its grammar before the first deadline; InputError if it is missing."""
    _math_verify()("x + 1", "1 + x")


def read_numeral(text: str) -> Numeral | None:
    """The number that a text is, or None: its sign, digits, fraction, power of ten, percent sign and unit, and nothing else."""
    plain = (
        _SPACING.sub(" ", text.strip().rstrip(".。").strip("$ ")).replace("\\left", "").replace("\\right", "").replace("−", "-")
    )
    plain = re.sub(r"^[A-Za-z]\s*=\s*", "", plain.strip()).removeprefix("\\$").lstrip("$€£¥ ")
    words = _TEXT_UNIT.search(plain)
    found = _NUMERAL.fullmatch(plain[: words.start()] if words else plain)
    if not found or not _UNIT.fullmatch(found["unit"]):
        return None
    unit = f"{found['unit']} {words[1] if words else ''}".casefold()
    if re.search(r"\d", words[1] if words else "") or not _NO_UNITS.isdisjoint({*unit.split(), *unit}):
        return None
    over, under = found["over"] or found["one"], found["under"] or found["other"] or found["by"]
    if under is not None and not int(under):
        return None
    digits = (found["number"] or "0").replace(",", "")
    value = Fraction(digits if over is None else over) / int(under or 1)
    power = int(found["power"] or found["exponent"] or 0)
    value = (value + int(found["whole"] or 0)) * (Fraction(10**power) if power >= 0 else Fraction(1, 10**-power))
    return Numeral(-value if found["sign"] == "-" else value, under is not None, "." in digits, found["percent"] is not None)


def same_number(expected: Numeral, given: Numeral) -> bool:
    """Whether `given` is `expected`, worked out: no fraction where that is an integer, and no more rounded than six places."""
    if given.fraction and not (expected.fraction or expected.percent) and expected.value.denominator == 1:
        return False
    tolerance = Fraction(0)
    if expected.fraction != given.fraction and (expected.decimal or given.decimal):
        tolerance = TOLERANCE * min(Fraction(1), max(abs(expected.value), abs(given.value)))
    readings = [{number.value, number.value / 100} if number.percent else {number.value} for number in (expected, given)]
    return any(abs(one - other) <= tolerance for one in readings[0] for other in readings[1])


@cache
def _math_verify() -> Callable[[str, str], bool]:
    """A function that tells whether two answers are equal."""
    try:
        import math_verify
    except ImportError:
        raise InputError("comparing mathematical expressions needs math-verify; install finback[rl]") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    forms = (math_verify.LatexExtractionConfig(),)

    def parse(text: str) -> Any:
        return math_verify.parse(f"\\boxed{{{text}}}", forms, parsing_timeout=None)

    def equal(expected: str, given: str) -> bool:
        answer = parse(expected)
        if all(isinstance(part, str) for part in answer):
            raise InputError(f'the row\'s "answer" {expected!r} is nothing that math-verify can read; use answers:exact for it')
        return bool(math_verify.verify(answer, parse(given), allow_set_relation_comp=True, timeout_seconds=None))

    return equal
