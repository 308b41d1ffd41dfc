"""The answer of a completion as a vote: in a form in which answers that mean the same are one text."""

import re
import unicodedata

from finback.rewards.answers import final_answer

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TRAILING_ZEROS = re.compile(r"(?<=\d)\.0+(?!\d)")


def vote(prompt: str, completion: str) -> str | None:
    """The final answer (`finback.rewards.answers.final_answer`) in one form, None where there is none.

    Width, case, spacing, dollar signs, commas between thousands, a fraction of nothing and a last full stop do not count. Expressions
    are not compared by what they are worth: 1/2 and 0.5 are two votes.
    """
    answer = final_answer(prompt, completion)
    if answer is None:
        return None
    plain = "".join(unicodedata.normalize("NFKC", answer).casefold().replace("\\$", "").replace("$", "").split())
    return _TRAILING_ZEROS.sub("", _THOUSANDS.sub("", plain)).rstrip(".。") or answer
