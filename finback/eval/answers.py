"""The answer inside a completion, and whether it is the expected one: exactly as text, or as a number."""

import re
import unicodedata
from decimal import Decimal, InvalidOperation

from finback.data.reasoning import opens_thought, parse_answer
from finback.eval.task import Example

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_LINE = re.compile(
    r"(?:^|\n)[ \t]*(?:\*\*)?(?:Answer|The answer is|答案)(?:\*\*)?[:：][ \t]*([^\n]+)|(?:^|\n)#### *([^\n]+)"
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def final_answer(prompt: str, completion: str) -> str | None:
    """The answer that a completion gives behind its thought, in one form; None where it gives none.

    The last `\\boxed{...}`, else the last `<answer>...</answer>`, else the last line `Answer: ...` (`答案：...`, `#### ...`). A
    thought that was never closed has no answer.
    """
    content = behind_thought(prompt, completion)
    if content is None:
        return None
    found = last_boxed(content)
    if found is None and (tags := _ANSWER_TAG.findall(content)):
        found = tags[-1]
    if found is None and (lines := _ANSWER_LINE.findall(content)):
        found = lines[-1][0] or lines[-1][1]
    return plain_answer(found) or None if found is not None else None


def final_number(prompt: str, completion: str) -> str | None:
    """The number that a completion ends with: that of `final_answer`, else the last one behind the thought."""
    content = behind_thought(prompt, completion)
    if content is None:
        return None
    marked = final_answer(prompt, completion)
    numbers = _NUMBER.findall(content if marked is None else marked)
    return plain_number(numbers[-1]) if numbers else None


def exact(prompt: str, completion: str, example: Example) -> float:
    """1.0 where the marked answer is the expected text, but for case, width and spacing."""
    return float(final_answer(prompt, completion) == plain_answer(str(example["answer"])))


def same_number(prompt: str, completion: str, example: Example) -> float:
    """1.0 where the last number is the expected one."""
    found = final_number(prompt, completion)
    return float(found is not None and found == plain_number(str(example["answer"])))


def behind_thought(prompt: str, completion: str) -> str | None:
    """A completion without its thought; None where the thought was never closed."""
    parts = parse_answer(completion.lstrip(), starts_in_thought=opens_thought(prompt), tools=False)
    return None if parts.thought == "open" else parts.content


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` whose braces match."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for place in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : place]
        start = text.rfind("\\boxed{", 0, start)
    return None


def plain_answer(text: str) -> str:
    """An answer in one form: width, case and spacing made equal, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。").strip()


def plain_number(text: str) -> str | None:
    """A number in one form, without commas and trailing zeros; None where the text is none."""
    try:
        value = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return format(value.normalize(), "f") if value.is_finite() else None
