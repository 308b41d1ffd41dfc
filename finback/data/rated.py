"""Responses and what was thought of them: pairs of a better and a worse one, or one with a label; as token ids, for reward models.

A row is `{"prompt", "chosen", "rejected"}` or `{"prompt", "completion", "label"}`; the prompt is a text or a list of messages, rendered
with the tokenizer's chat template if there is one. Of pairs only the final answers are compared, thoughts left out; a labelled response
is judged whole (R1 in Nature, Methods).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finback.config import InputError
from finback.data.chat import Message
from finback.data.conversations import check_text, checked_messages, read_rows
from finback.data.stream import permute
from finback.data.tokenizer import END_THINK_TOKEN, THINK_TOKEN, Tokenizer

Prompt = str | Sequence[Message]
_LABELS = {0: False, 1: True, "bad": False, "good": True, "unsafe": False, "safe": True}
_LENGTH_BINS = 8


@dataclass(frozen=True)
class Rated:
    """One row: the better and the worse text of a pair, or a single text; `responses` are their tokens behind the prompt."""

    texts: tuple[Sequence[int], ...]
    responses: tuple[Sequence[int], ...]
    good: bool
    """What a single text was labelled; True for pairs."""


def load_rated(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    kind: Literal["pairwise", "pointwise"],
    *,
    sequence_length: int,
    skip_malformed: bool = False,
) -> tuple[list[Rated], list[str]]:
    """All rows of .jsonl and .parquet files, and a sentence for each that was left out.

    Raises InputError naming file and line of the first row that is malformed or too long, unless `skip_malformed`.
    """
    rated: list[Rated] = []
    skipped: list[str] = []
    for row in chain.from_iterable(read_rows(file) for file in files):
        try:
            one = rated_row(row.record, tokenizer, kind)
            longest = max(len(text) for text in one.texts)
            if longest > sequence_length:
                raise InputError(f"it has {longest} tokens, more than sequence_length ({sequence_length}); raise that")
        except InputError as error:
            if not skip_malformed:
                raise InputError(f"{row.where}: {error}; correct the row, or leave such rows out with --skip-malformed") from None
            skipped.append(f"{row.where}: {error}")
        else:
            rated.append(one)
    if not rated:
        raise InputError(f"{', '.join(map(str, files))} give no row to train on; {len(skipped)} were left out")
    return rated, skipped


def rated_row(record: Any, tokenizer: Tokenizer, kind: Literal["pairwise", "pointwise"]) -> Rated:
    """One record; InputError says what is wrong with it."""
    if isinstance(record, InputError):
        raise record
    names = ("chosen", "rejected") if kind == "pairwise" else ("completion",)
    if not isinstance(record, dict) or not {"prompt", *names} <= record.keys():
        raise InputError(f"it must be an object with prompt, {' and '.join(names)}{' and label' if kind == 'pointwise' else ''}")
    prompt = record["prompt"]
    prompt = checked_messages(prompt) if isinstance(prompt, list) else prompt
    if isinstance(prompt, str) or not isinstance(prompt, list):
        check_text(prompt, "prompt")
    for name in names:
        check_text(record[name], name)
    label: Any = True
    if kind == "pointwise":
        label = record.get("label")
        if not isinstance(label, str | int) or label not in _LABELS:
            raise InputError(f"its label is {label!r}, it must be 1 (good) or 0 (bad)")
        label = _LABELS[label]
    parts = [rated_ids(prompt, record[name], tokenizer, kind) for name in names]
    return Rated(tuple(text for text, _ in parts), tuple(response for _, response in parts), label)


def rated_ids(
    prompt: Prompt, completion: str, tokenizer: Tokenizer, kind: Literal["pairwise", "pointwise"]
) -> tuple[list[int], list[int]]:
    """(all ids, those of the response) of a text to be scored: the prompt, the response (for pairs its final answer), the end."""
    if kind == "pairwise":
        completion = final_answer(completion)
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        if text.rstrip().endswith(THINK_TOKEN):  # the prompt opens the thought: an answer without it does not follow that tag
            if kind == "pairwise":
                text = text[: text.rindex(THINK_TOKEN)]
            else:
                completion = completion.removeprefix(THINK_TOKEN).lstrip("\n")
        start = tokenizer.encode(text)
    elif isinstance(prompt, str):
        start = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token)
    else:
        raise InputError("this tokenizer has no chat template, so a prompt must be a text and not messages")
    response = tokenizer.encode(completion)
    if response[-1:] != [tokenizer.eos_token_id]:
        response.append(tokenizer.eos_token_id)
    return start + response, response


def final_answer(completion: str) -> str:
    """What follows the thought; nothing if a thought is opened and never closed."""
    before, tag, after = completion.partition(END_THINK_TOKEN)
    if tag:
        return after.lstrip("\n")
    return "" if before.lstrip().startswith(THINK_TOKEN) else completion


def balanced_split(rated: Sequence[Rated], fraction: float, seed: int) -> tuple[list[Rated], list[Rated]]:
    """(to train on, held out), the latter about `fraction` and such that length tells nothing: as many pairs whose better response is
    the longer one as pairs whose better one is the shorter, or as many good as bad responses among those of like length.

    Raises InputError if there is no such choice.
    """
    order = [permute(place, len(rated), key=(seed, 0)) for place in range(len(rated))]
    groups: list[tuple[list[int], list[int]]] = []
    if len(rated[0].texts) == 2:
        longer = [index for index in order if len(rated[index].responses[0]) > len(rated[index].responses[1])]
        shorter = [index for index in order if len(rated[index].responses[0]) < len(rated[index].responses[1])]
        groups.append((longer, shorter))
        remedy = "add pairs whose better response is the longer one, and such where it is the shorter"
    else:
        edges = np.quantile([len(one.responses[0]) for one in rated], np.linspace(0, 1, _LENGTH_BINS + 1)[1:-1])
        bins = [int(np.searchsorted(edges, len(one.responses[0]))) for one in rated]
        for number in range(_LENGTH_BINS):
            own = [index for index in order if bins[index] == number]
            groups.append(([i for i in own if rated[i].good], [i for i in own if not rated[i].good]))
        remedy = "add good and bad responses of like length"
    wanted = max(1, round(fraction * len(rated) / 2))
    room = [min(len(one), len(other)) for one, other in groups]
    held: set[int] = set()
    for (one, other), have in zip(groups, room, strict=True):
        count = min(math.ceil(wanted * have / max(1, sum(room))), have, wanted - len(held) // 2)
        held.update(one[:count], other[:count])
    if not held:
        raise InputError(f"no held-out rows can be balanced by length; {remedy}")
    if len(held) == len(rated):
        raise InputError(f"{len(rated)} rows are too few to train on some and hold out others; add rows")
    return [rated[index] for index in range(len(rated)) if index not in held], [rated[index] for index in sorted(held)]


def rated_fingerprint(rated: Sequence[Rated]) -> str:
    """SHA-256 over all ids and labels."""
    digest = hashlib.sha256()
    for one in rated:
        for text in one.texts:
            digest.update(len(text).to_bytes(8, "little") + np.asarray(text, dtype=np.int64).tobytes())
        digest.update(bytes([one.good]))
    return digest.hexdigest()
