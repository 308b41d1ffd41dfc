"""Prompts of a run: rows of data files, as texts and token ids."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.config import InputError
from finback.data.chat import Message
from finback.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """One row: what the model reads, and the row itself, from which rewards read the answer."""

    text: str
    token_ids: list[int]
    example: Mapping[str, Any]


def read_prompts(files: Sequence[str], tokenizer: Tokenizer, template: str | None, *, longest: int) -> list[Prompt]:
    """The rows of .jsonl and .parquet files, in order. `longest` is the most tokens that a prompt may have.

    Raises InputError, naming file and line (or row), for a row without a prompt, one that is too long, or a file without rows.
    """
    if template is None and tokenizer.chat_template is None:
        raise InputError("the model has no chat template; give the field template, a text with {prompt} in it")
    prompts = []
    for file in files:
        for place, row in _rows(Path(file)):
            text = _prompt_text(row, tokenizer, template, place)
            token_ids = tokenizer.encode(text, add_bos=tokenizer.add_bos_token and not _has_bos(text, tokenizer))
            if len(token_ids) > longest:
                raise InputError(
                    f"{place}: the prompt has {len(token_ids)} tokens, and the model's context leaves {longest} beside "
                    "max_completion_length; shorten it, or lower max_completion_length"
                )
            prompts.append(Prompt(text, token_ids, row))
    if not prompts:
        raise InputError("field data names no rows; give .jsonl or .parquet files with a prompt in each row")
    return prompts


def render_prompt(prompt: str | Sequence[Message], tokenizer: Tokenizer, template: str | None) -> str:
    """The text that the model continues. A template's {prompt} is replaced by the last message's content."""
    if template is not None:
        content = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return template.replace("{prompt}", content)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def _has_bos(text: str, tokenizer: Tokenizer) -> bool:
    """Chat templates write the token themselves."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _prompt_text(row: Any, tokenizer: Tokenizer, template: str | None, place: str) -> str:
    prompt: Any = row.get("prompt") if isinstance(row, dict) else None
    messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt)
    if not isinstance(prompt, str) and not messages:
        raise InputError(f"{place}: the row has no prompt; it needs the field prompt, a text or a list of messages")
    return render_prompt(prompt, tokenizer, template)


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the row) for each row."""
    if not file.is_file():
        raise InputError(f"field data names {file}, which is no file; give .jsonl or .parquet files")
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise InputError(f"{file} needs the package pyarrow; install finback[data]") from None
        for number, row in enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1):
            yield f"{file}, row {number}", row
        return
    if file.suffix != ".jsonl":
        raise InputError(f"field data names {file}; give .jsonl or .parquet files")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{file}, line {number}", json.loads(line)
                except ValueError as error:
                    raise InputError(f"{file}, line {number} is not JSON ({error}); mend or remove the line") from None
