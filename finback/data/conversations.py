"""Fine-tuning data: rows of conversations or of prompts with completions become token ids and what of them is learnt.

A row is `{"messages": [{"role", "content", ("reasoning_content")}, ...]}`, rendered with a chat template, or
`{"prompt": text, "completion": text}`, taken as it is. What is learnt is what the model itself would write: each assistant turn, from
the end of its generation prompt to its end-of-sentence token, that token included.

Prompts are rendered and tokenised as at inference, one for each assistant turn, and the turn's own tokens follow. A later turn
continues the sample of the one before if its prompt begins with exactly the tokens so far; otherwise it is a sample of its own. So a
template that drops earlier thoughts (R1's) gives a sample for each turn behind a thought, and one that keeps all gives one sample.

A thought stands in `reasoning_content`, or in the content between `<think>` and `</think>`. Where a template opens the thought in its
generation prompt (R1's), thought, `</think>` and answer follow it in the published layout, also if the template drops the thought when
it renders the turn as history; a turn without a thought then learns to close it at once.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from finback.config import InputError
from finback.data.chat import Message, published_template
from finback.data.packing import Sample
from finback.data.sources import parquet_batches
from finback.data.tokenizer import END_THINK_TOKEN, THINK_TOKEN, Tokenizer

PUBLISHED_TEMPLATES = ("deepseek_r1", "deepseek_v3")


@dataclass(frozen=True)
class Row:
    """One record of a data file, and where it stands: "chat.jsonl, line 3"."""

    where: str
    record: Any


@dataclass(frozen=True)
class LoadedSamples:
    """Samples in the order of the rows they come from, and a sentence for each row that was left out."""

    samples: list[Sample]
    skipped: list[str]
    truncated: int
    """Samples that were cut at their end."""


def with_chat_template(tokenizer: Tokenizer, chat_template: str) -> Tokenizer:
    """`tokenizer` with another template: the name of a published one ("deepseek_r1", "deepseek_v3") or a file."""
    if chat_template in PUBLISHED_TEMPLATES:
        text = published_template(chat_template)
    else:
        try:
            text = Path(chat_template).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            names = " or ".join(PUBLISHED_TEMPLATES)
            raise InputError(
                f"chat template {chat_template!r} is neither a text file nor a published one; give a file, {names}"
            ) from None
    return Tokenizer(tokenizer.backend, tokenizer.config, text)


def load_samples(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    truncate: bool = False,
    skip_malformed: bool = False,
) -> LoadedSamples:
    """All rows of .jsonl and .parquet files as samples of at most `sequence_length` tokens.

    Raises InputError naming file and line of the first row that is malformed or too long, unless `skip_malformed` leaves such rows out
    (or `truncate` cuts long ones); and if nothing is left.
    """
    loaded = LoadedSamples([], [], 0)
    truncated = 0
    for row in chain.from_iterable(read_rows(file) for file in files):
        try:
            samples = []
            for sample in row_samples(row.record, tokenizer):
                cut = len(sample.ids) > sequence_length
                samples.append(_fitted(sample, sequence_length, truncate) if cut else sample)
                truncated += cut
        except InputError as error:
            if not skip_malformed:
                raise InputError(f"{row.where}: {error}; correct the row, or leave such rows out with --skip-malformed") from None
            loaded.skipped.append(f"{row.where}: {error}")
        else:
            loaded.samples.extend(samples)
    if not loaded.samples:
        left_out = f"; {len(loaded.skipped)} rows were left out, the first one: {loaded.skipped[0]}" if loaded.skipped else ""
        raise InputError(f"{', '.join(map(str, files))} give no sample to train on{left_out}")
    return LoadedSamples(loaded.samples, loaded.skipped, truncated)


def _fitted(sample: Sample, sequence_length: int, truncate: bool) -> Sample:
    if not truncate:
        raise InputError(
            f"it has {len(sample.ids)} tokens, more than sequence_length ({sequence_length}); raise that or cut with --truncate"
        )
    cut = Sample(sample.ids[:sequence_length], sample.loss_mask[:sequence_length])
    if not any(cut.loss_mask[1:]):
        raise InputError(f"its prompt alone fills sequence_length ({sequence_length}), nothing is left to learn")
    return cut


def read_rows(file: str | Path) -> Iterator[Row]:
    """The records of a .jsonl or .parquet file, in order; a line that is not JSON is a row whose record is the error."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file} does not exist; give .jsonl or .parquet files")
    if file.suffix == ".jsonl":
        return _jsonl_rows(file)
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    raise InputError(f"{file} has suffix {file.suffix!r}; give .jsonl or .parquet")


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                yield Row(where, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Row(where, InputError(f"it is not valid JSON ({error})"))


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading Parquet needs pyarrow; install finback[data]") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file} is not a Parquet file: {error}") from None
    with table:
        number = 0
        for batch in parquet_batches(table, file):
            for record in batch.to_pylist():
                yield Row(f"{file}, row {number}", {key: value for key, value in record.items() if value is not None})
                number += 1


def row_samples(record: Any, tokenizer: Tokenizer) -> list[Sample]:
    """The samples of one record; InputError says what is wrong with it."""
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, Mapping):
        raise InputError(f"it holds a JSON {type(record).__name__} where an object is expected")
    if "messages" in record:
        return conversation_samples(checked_messages(record["messages"]), tokenizer)
    if "prompt" in record and "completion" in record:
        for name in ("prompt", "completion"):
            check_text(record[name], name)
        return [completion_sample(record["prompt"], record["completion"], tokenizer)]
    raise InputError("it has neither messages nor prompt and completion")


def completion_sample(prompt: str, completion: str, tokenizer: Tokenizer) -> Sample:
    """Texts as they are: the prompt tokenised as a prompt is at inference, then what is learnt, the completion and its end."""
    if not completion:
        raise InputError("its completion is empty")
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos_token and not prompt.startswith(tokenizer.bos_token or "\0"))
    if not ids:
        raise InputError("its prompt is empty")
    return _sample(ids, _ended(tokenizer.encode(completion), tokenizer))


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _sample(prompt: Sequence[int], completion: Sequence[int]) -> Sample:
    return Sample([*prompt, *completion], [False] * len(prompt) + [True] * len(completion))


def conversation_samples(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Sample]:
    """The samples of a conversation, every assistant turn learnt once; see the module for how turns share a sample."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("it has no assistant turn to learn")
    samples: list[Sample] = []
    for index in turns:
        prompt, completion = turn_texts(messages[: index + 1], tokenizer)
        prompt_ids, completion_ids = tokenizer.encode(prompt), _up_to_end(tokenizer.encode(completion), tokenizer)
        if not prompt_ids:
            raise InputError("the chat template puts nothing before the first assistant turn")
        known = len(samples[-1].ids) if samples else 0
        if samples and prompt_ids[:known] == list(samples[-1].ids):
            before = samples.pop()
            following = _sample(prompt_ids[known:], completion_ids)
            samples.append(Sample([*before.ids, *following.ids], [*before.loss_mask, *following.loss_mask]))
        else:
            samples.append(_sample(prompt_ids, completion_ids))
    return samples


def _up_to_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """A turn without what the template puts behind its end-of-sentence token (a newline, often)."""
    for end in range(len(ids), 0, -1):
        if ids[end - 1] == tokenizer.eos_token_id:
            return ids[:end]
    raise InputError(
        f"the chat template does not end an assistant turn with the tokenizer's end-of-sentence token {tokenizer.eos_token!r}, "
        "so the model would never learn to stop; give another --chat-template"
    )


def turn_texts(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, str]:
    """(prompt, completion) of the last message, an assistant turn: what the model is given, and what it is to write."""
    *history, turn = messages
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True)
    rendered = tokenizer.apply_chat_template(messages)
    thought, answer = split_thought(turn)
    if rendered.startswith(prompt) and _keeps(rendered[len(prompt) :], thought):
        return prompt, rendered[len(prompt) :]
    if prompt.rstrip().endswith(THINK_TOKEN):
        opening = prompt[: prompt.rindex(THINK_TOKEN)]
        if rendered.startswith(opening):
            rest = rendered[len(opening) :].lstrip("\n")
            return prompt, f"{thought or ''}\n{END_THINK_TOKEN}\n\n{rest}"
    elif thought is not None:
        whole = f"{THINK_TOKEN}\n{thought}\n{END_THINK_TOKEN}\n\n{answer}"
        plain = {key: value for key, value in turn.items() if key != "reasoning_content"}
        rendered = tokenizer.apply_chat_template([*history, plain | {"content": whole}])
        if rendered.startswith(prompt + whole):
            return prompt, rendered[len(prompt) :]
    raise InputError("the chat template renders an assistant turn otherwise than behind its own generation prompt")


def _keeps(completion: str, thought: str | None) -> bool:
    """Whether the template has kept the thought, closed, in front of the answer."""
    if thought is None:
        return True
    start = completion.find(thought)
    return start >= 0 and END_THINK_TOKEN in completion[start + len(thought) :]


def split_thought(turn: Message) -> tuple[str | None, str]:
    """(thought, answer) of an assistant turn, the newlines of the published layout taken off; the thought is None if there is none."""
    content = turn["content"] or ""
    if isinstance(turn.get("reasoning_content"), str):
        return turn["reasoning_content"].strip("\n"), content
    opening, tag, rest = content.partition(THINK_TOKEN)
    if not tag or opening.strip() or END_THINK_TOKEN not in rest:
        return None, content
    thought, _, answer = rest.partition(END_THINK_TOKEN)
    return thought.strip("\n"), answer.lstrip("\n")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of a record without null fields; InputError says what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        raise InputError("its messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number} is a {type(message).__name__}, it must have a role and a content")
        kept = {key: value for key, value in message.items() if value is not None}  # Parquet fills what is absent with nulls
        check_text(kept.get("role"), f"role of message {number}")
        if not (kept["role"] == "assistant" and kept.get("tool_calls")):
            check_text(kept.get("content"), f"content of message {number}")
        if "reasoning_content" in kept:
            check_text(kept["reasoning_content"], f"reasoning_content of message {number}")
        checked.append({**kept, "content": kept.get("content")})
    return checked


def check_text(value: Any, name: str) -> None:
    """InputError if a field of a record is no text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"its {name} is {'missing' if value is None else f'a {type(value).__name__}'}, it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"its {name} holds half of a surrogate pair (character {error.start})") from None


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over all ids and masks: whether a resumed run has the data it started with."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(8, "little"))
        digest.update(np.asarray(sample.ids, dtype=np.int64).tobytes())
        digest.update(np.asarray(sample.loss_mask, dtype=np.bool_).tobytes())
    return digest.hexdigest()
