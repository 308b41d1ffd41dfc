"""Random splits of tokens that join punctuation and line breaks.

DeepSeek's pre-tokenizer lets one token hold punctuation and the line breaks after it. A prompt that ends with the
punctuation alone then meets a boundary that training never showed. V3 (section 4.1) splits a share of such tokens at
random; the share is not published.
"""

import random
import unicodedata
from collections.abc import Sequence

from finback.data.tokenizer import Tokenizer

BoundaryTable = dict[int, tuple[int, ...]]


def boundary_table(tokenizer: Tokenizer) -> BoundaryTable:
    """For each token made of punctuation or symbols followed by line breaks: the ids that spell it with the two parts
    apart."""
    table: BoundaryTable = {}
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        marks = text.rstrip("\r\n")
        if not marks.strip(" ") or marks == text or "\ufffd" in text:
            continue
        if all(unicodedata.category(char)[0] in "PS" for char in marks.removeprefix(" ")):
            table[token_id] = tuple(tokenizer.encode(marks) + tokenizer.encode(text[len(marks) :]))
    return table


def split_boundaries(ids: Sequence[int], table: BoundaryTable, *, seed: int, index: int, rate: float) -> list[int]:
    """`ids` with each token of `table` spelled apart with probability `rate`; the decoded text is the same.

    The outcome depends on (ids, seed, index) only.
    """
    generator = random.Random(f"boundary/{seed}/{index}")
    out: list[int] = []
    for token_id in ids:
        if token_id in table and generator.random() < rate:
            out.extend(table[token_id])
        else:
            out.append(token_id)
    return out
