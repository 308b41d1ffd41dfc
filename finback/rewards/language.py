"""Which languages a text is written in, by its characters alone, and R1's reward for a thought in one language (R1-N equation 7).

What counts as a word: every Han character ("zh"); every run of two or more ASCII letters ("en"); every run of letters of another
script, or of Latin letters beyond ASCII ("other"; each kana counts as one, and the Han characters of Japanese cannot be told from
Chinese). Not words: numbers, punctuation, single letters (they are variables more often than "a" or "I"), names of functions such as
sin, and whatever stands in LaTeX, in a formula between dollar signs, in a code block or in backticks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from finback.config import InputError
from finback.data.reasoning import opens_thought, parse_answer
from finback.rewards.reward import Example

LANGUAGES = ("zh", "en", "other")
MIXING_WORDS = 2
MIXING_SHARE = 0.1

_CLOSING = {"```": "```", "`": "`", "$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)"}
_IN_A_LINE = ("`", "$")
_OPENING = re.compile("|".join(map(re.escape, _CLOSING)))
_MARKUP = re.compile(r"\\[A-Za-z]+|<[^<>\n]{0,40}>|https?://\S+")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3041-\u3096\u30a1-\u30fa"
_WORD = re.compile(rf"[{_HAN}]|[{_KANA}]|(?:(?![{_HAN}{_KANA}])[^\W\d_])(?:['’]?(?:(?![{_HAN}{_KANA}])[^\W\d_]))*")
_PROGRAMMING = ("python", "c", "cpp")  # what "language" says in rows of programs
_FUNCTIONS = re.compile("sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min|mod|gcd|lcm|lim|sqrt|det|arg|abs", re.IGNORECASE)


def language_consistency(prompt: str, completion: str, example: Example) -> float:
    """Share of the words of the thought that are in the target language, from 0 to 1 (R1-N equation 7).

    The target is the row's "language", "zh" or "en"; without one, or with one of programs, that of most of the words of the row's own
    prompt, without the template around it; where that has no words either, the thought's main language. A thought that never ends
    counts as far as it goes. A thought without a word (formulas only) is consistent; no thought, or an empty one, is not. Raises
    InputError if the row names another language.
    """
    target = _target(prompt, example)
    thought = parse_answer(completion.lstrip(), starts_in_thought=opens_thought(prompt), tools=False).reasoning
    if not thought.strip():
        return 0.0
    counts = languages(thought)
    total = sum(counts.values())
    consistent = max(counts.values()) if target is None else counts[target]
    return consistent / total if total else 1.0


def languages(text: str) -> dict[str, int]:
    """How many words of a text are "zh", "en" and "other", by the rule above."""
    counts = dict.fromkeys(LANGUAGES, 0)
    for found in _WORD.finditer(_MARKUP.sub(" ", _prose(text))):
        language = _language(found[0])
        if language is not None:
            counts[language] += 1
    return counts


def mixing(text: str) -> bool:
    """Whether a text mixes languages: at least two words, and a tenth of all, are not in its main language."""
    counts = languages(text)
    total = sum(counts.values())
    minor = total - max(counts.values())
    return minor >= MIXING_WORDS and minor >= MIXING_SHARE * total


def mixing_rate(texts: Iterable[str]) -> float:
    """Share of texts that mix languages; 0 of none."""
    mixed = [mixing(text) for text in texts]
    return sum(mixed) / max(1, len(mixed))


def _prose(text: str) -> str:
    """A text without its formulas and code; what is opened and never closed is text, but for code blocks.

    No search for an end is repeated where none was found, so the time is linear in the text.
    """
    parts: list[str] = []
    never: set[str] = set()
    place = 0
    while found := _OPENING.search(text, place):
        opening = found[0]
        end = -1 if opening in never else text.find(_CLOSING[opening], found.end())
        if end < 0:
            never.add(opening)
            if opening == "```":
                return " ".join([*parts, text[place : found.start()]])
        parts.append(text[place : found.start()])
        cut = end >= 0 and not (opening in _IN_A_LINE and "\n" in text[found.end() : end])
        place = end + len(opening) if cut else found.end()
    return " ".join([*parts, text[place:]])


def _language(word: str) -> str | None:
    if re.match(f"[{_HAN}]", word):
        return "zh"
    if not word.replace("’", "'").isascii():
        return "other"
    return None if len(word) < 2 or _FUNCTIONS.fullmatch(word) else "en"


def _target(prompt: str, example: Example) -> str | None:
    """The language that is asked for; None where nothing tells which, and any one will do."""
    target = example.get("language")
    if target is None or target in _PROGRAMMING:
        counts = languages(_asked(prompt, example))
        target = max(LANGUAGES, key=lambda language: counts[language])
        return target if counts[target] else None
    if target not in ("zh", "en"):
        raise InputError(f'the row\'s "language" is {target!r}, it must be "zh" or "en"')
    return str(target)


def _asked(prompt: str, example: Example) -> str:
    """The row's prompt, or the last of its messages; else the rendered prompt, whose template has words of its own."""
    asked = example.get("prompt")
    if isinstance(asked, Sequence) and not isinstance(asked, str) and asked and isinstance(asked[-1], Mapping):
        asked = asked[-1].get("content")
    return asked if isinstance(asked, str) else prompt
