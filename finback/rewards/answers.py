"""The final answer of a completion, and rewards that compare it with the row's as text.

The answer is what stands at one fixed place behind the thought, never the right number found anywhere. Reinforcement learning finds
every looser rule: with "the reference occurs in the text" a small model soon writes many numbers, or the number in its thought alone,
and its strict score falls while its reward rises. So an answer inside the thought does not count, a thought that never ends has no
answer, and of several candidates one is taken by its place.
"""

import re
import unicodedata

from finback.config import InputError
from finback.data.reasoning import opens_thought, parse_answer
from finback.data.tokenizer import END_THINK_TOKEN, THINK_TOKEN
from finback.rewards.reward import Example

ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
_BOX = "\\boxed{"
_LINE = re.compile(r"(?:the\s+)?(?:final\s+)?(?:answer|最终答案|答案)(?:\s+is|是|为)?\s*[:：]\s*(.+)", re.IGNORECASE)
_EMPHASIS = "*_ \t"
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_AROUND_COMMA = re.compile(" ?, ?")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def exact(prompt: str, completion: str, example: Example) -> float:
    """1 if the final answer is the row's "answer" as text, else 0.

    The answer may stand in any form of `final_answer`. Compared are the two without outer white space, dollar signs and a last full
    stop, with characters in their plain form (NFKC), runs of white space as one, none around commas; where the reference is a number,
    commas between thousands do not count. Case does.
    """
    return _compare(final_answer(prompt, completion), example)


def exact_boxed(prompt: str, completion: str, example: Example) -> float:
    """`exact`, with the answer in the last \\boxed{...} behind the thought and nowhere else."""
    behind = behind_thought(prompt, completion)
    return _compare(None if behind is None else boxed(behind), example)


def exact_answer_tag(prompt: str, completion: str, example: Example) -> float:
    """`exact`, with the answer between <answer> and </answer> behind the thought and nowhere else."""
    behind = behind_thought(prompt, completion)
    return _compare(None if behind is None else answer_tag(behind), example)


def final_answer(prompt: str, completion: str) -> str | None:
    """The answer that a completion ends with, or None.

    Behind the thought, in this order: what the last <answer> tag holds; the last \\boxed{...} (inside the tag, if both are there); the
    last line, if it is "Answer: ..." or "答案：...". A tag or box that is opened and never closed is no answer, and what stands before
    it is none either.
    """
    behind = behind_thought(prompt, completion)
    if behind is None:
        return None
    if ANSWER_OPEN in behind:
        tagged = answer_tag(behind)
        return boxed(tagged) if tagged is not None and _BOX in tagged else tagged
    if _BOX in behind:
        return boxed(behind)
    return _answer_line(behind)


def behind_thought(prompt: str, completion: str) -> str | None:
    """What follows the thought, or the whole completion if there is none.

    None if the thought never ends, or if another think tag stands behind it: then it is not told which part is the thought.
    """
    # Behind "Assistant:" a model writes a space or a line's end first.
    parts = parse_answer(completion.lstrip(), starts_in_thought=opens_thought(prompt), tools=False)
    if parts.thought == "open" or THINK_TOKEN in parts.content or END_THINK_TOKEN in parts.content:
        return None
    return parts.content


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds, its braces balanced (\\{ and \\} do not count); None without one."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    begin = place = start + len(_BOX)
    depth = 1
    while place < len(text):
        match text[place]:
            case "\\":
                place += 1
            case "{":
                depth += 1
            case "}":
                depth -= 1
                if depth == 0:
                    return _given(text[begin:place])
        place += 1
    return None


def answer_tag(text: str) -> str | None:
    """What stands between the last <answer> and the </answer> behind it; None without one, or if it is empty."""
    start = text.rfind(ANSWER_OPEN)
    if start < 0:
        return None
    inside, closed, _ = text[start + len(ANSWER_OPEN) :].partition(ANSWER_CLOSE)
    return _given(inside) if closed else None


def reference(example: Example) -> str:
    """The row's "answer" as text; InputError if it has none."""
    answer = example.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f'the row\'s "answer" is {answer!r}; give a text or a number')
    if not str(answer).strip():
        raise InputError('the row\'s "answer" is empty; give the right answer')
    return str(answer)


def same_text(expected: str, given: str) -> bool:
    """Whether two answers are the same by the rules of `exact`."""
    expected, given = _plain(expected), _plain(given)
    if _is_number(expected) and _is_number(given):
        return expected.replace(",", "") == given.replace(",", "")
    return _AROUND_COMMA.sub(",", expected) == _AROUND_COMMA.sub(",", given)


def _compare(given: str | None, example: Example) -> float:
    expected = reference(example)
    return float(given is not None and same_text(expected, given))


def _plain(answer: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", answer).replace("−", "-").split())
    if len(text) > 1 and text[-1] in ".。":
        text = text[:-1]
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1]
    return text.strip()


def _is_number(text: str) -> bool:
    return bool(_THOUSANDS.fullmatch(text) or _NUMBER.fullmatch(text))


def _answer_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    found = _LINE.fullmatch(lines[-1].replace("**", "").strip(_EMPHASIS)) if lines else None
    return _given(found[1]) if found else None


def _given(text: str) -> str | None:
    return text.strip() or None
