"""How often a text reflects on itself: a number to plot over a run, not a reward.

Rewarded words would be written for their own sake.
"""

import re
from collections.abc import Iterable

ENGLISH = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
"""R1-N, extended data figure 1."""
CHINESE = ("等等", "等一下", "错误", "错了", "不对", "然而", "但是", "不过", "重新", "重试", "验证", "检查", "检验", "再想")
"""Our own list; the paper gives none."""

_WORDS = re.compile(rf"\b(?:{'|'.join(ENGLISH)})\b|{'|'.join(CHINESE)}", re.IGNORECASE)


def reflection_words(text: str) -> dict[str, int]:
    """How often each reflection word occurs in a text, in lower case; English ones as whole words in the form listed."""
    counts: dict[str, int] = {}
    for found in _WORDS.finditer(text):
        word = found[0].lower()
        counts[word] = counts.get(word, 0) + 1
    return counts


def reflects(text: str) -> bool:
    """Whether a text has any reflection word."""
    return _WORDS.search(text) is not None


def reflection_share(texts: Iterable[str]) -> float:
    """Share of texts that reflect; 0 of none."""
    found = [reflects(text) for text in texts]
    return sum(found) / max(1, len(found))
