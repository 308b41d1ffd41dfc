"""Whether a thought mixes languages: the trouble of R1-Zero that R1's language reward is against (R1 section 2.3.2)."""

import re

_HAN = re.compile(r"[一-鿿]")
_LATIN_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-zÀ-ɏ]{2,}")  # no commands of LaTeX


def mixes(thought: str, question: str) -> bool:
    """Whether Chinese characters and words in Latin letters both stand in a thought. Words that the question itself holds, a
    name or what is to be spelt, do not count, nor do single letters."""
    allowed = {word.casefold() for word in _LATIN_WORD.findall(question)}
    foreign = any(word.casefold() not in allowed for word in _LATIN_WORD.findall(thought))
    return foreign and _HAN.search(thought) is not None
