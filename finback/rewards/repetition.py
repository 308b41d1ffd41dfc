"""A penalty for saying the same again: what a policy falls into when length or words are rewarded."""

import re

from finback.rewards.reward import Example

NGRAM_WORDS = 4
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]")  # a Han character, a word or number, a mark


def repetition(prompt: str, completion: str, example: Example) -> float:
    """Minus the share of the completion's 4-grams of words that occurred before in it: 0 for none, towards -1 for a loop."""
    return -repeated_share(completion, NGRAM_WORDS)


def repeated_share(text: str, size: int = NGRAM_WORDS) -> float:
    """Share of the n-grams of `size` words that are repetitions of an earlier one; 0 for a text shorter than one.

    A word is a Han character, a run of letters and digits, or a punctuation mark; case counts.
    """
    words = _WORD.findall(text)
    total = len(words) - size + 1
    if total < 1:
        return 0.0
    different = len({tuple(words[start : start + size]) for start in range(total)})
    return (total - different) / total
