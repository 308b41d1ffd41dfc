"""Prompts of a run: rows of data files, as texts and token ids."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from finback.config import InputError
from finback.data.chat import Message
from finback.data.conversations import read_rows
from finback.data.tokenizer import Tokenizer

_TOLD = 5  # malformed rows of a file that are told one by one


@dataclass(frozen=True)
class Prompt:
    """One row: what the model reads, and the row itself, from which rewards read the answer."""

    text: str
    token_ids: list[int]
    example: Mapping[str, Any]
    judged_by: frozenset[str] | None = None
    """Names of the rewards that judge its samples; None: all of them."""
    where: str = ""
    """File and line that it comes from."""


def read_prompts(
    files: Sequence[str],
    tokenizer: Tokenizer,
    template: str | None,
    *,
    longest: int,
    rewards: Collection[str] | None = None,
    skipped: list[str] | None = None,
) -> list[Prompt]:
    """The rows of .jsonl and .parquet files, in order. `longest` is the most tokens that a prompt may have. A row's `judged_by` names
    those of the `rewards` that judge its samples; without `rewards` it is not looked at.

    Raises InputError, naming file and line (or row), for a row without a prompt, or one that is too long; where `skipped` is given,
    such rows are left out and get a sentence in it. InputError also if no row is left.
    """
    if template is None and tokenizer.chat_template is None:
        raise InputError("the model has no chat template; give the field template, a text with {prompt} in it")
    prompts = []
    for row in chain.from_iterable(read_rows(file) for file in files):
        try:
            prompts.append(replace(_prompt(row.record, tokenizer, template, longest, rewards), where=row.where))
        except InputError as error:
            if skipped is None:
                raise InputError(f"{row.where}: {error}") from None
            skipped.append(f"{row.where}: {error}")
    if not prompts:
        left_out = f"; {len(skipped)} rows are malformed, the first one: {skipped[0]}" if skipped else ""
        raise InputError(f"field data names no rows; give .jsonl or .parquet files with a prompt in each row{left_out}")
    return prompts


def check_vocabulary(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """InputError, naming file and line, for a prompt with tokens that the model does not have."""
    for prompt in prompts:
        if max(prompt.token_ids, default=0) >= vocab_size:
            raise InputError(
                f"{prompt.where}: the prompt has token {max(prompt.token_ids)}, outside of the model's vocabulary ({vocab_size}); its "
                "tokenizer belongs to another model"
            )


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over the token ids and rows of prompts, in their order: whether a resumed run has those that it was started with."""
    digest = hashlib.sha256()
    for prompt in prompts:
        text = json.dumps([prompt.token_ids, prompt.example], sort_keys=True, default=str)  # Parquet has values that JSON has not
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def tell_skipped(skipped: Sequence[str]) -> list[str]:
    """How many malformed rows were left out, file by file, and what is wrong with the first few of each, in sentences."""
    by_file: dict[str, list[str]] = {}
    for sentence in skipped:
        by_file.setdefault(re.split(", (?:line|row) ", sentence)[0], []).append(sentence)
    told = []
    for file, sentences in by_file.items():
        rest = len(sentences) - _TOLD
        told.append(f"{len(sentences)} malformed rows of {file} are left out:")
        told += [f"  {sentence}" for sentence in sentences[:_TOLD]]
        told += [f"  and {rest} more"] if rest > 0 else []
    return told


def _prompt(record: Any, tokenizer: Tokenizer, template: str | None, longest: int, rewards: Collection[str] | None) -> Prompt:
    if isinstance(record, InputError):
        raise InputError(f"{record}; mend or remove it")
    text = _prompt_text(record, tokenizer, template)
    token_ids = tokenizer.encode(text, add_bos=tokenizer.add_bos_token and not _has_bos(text, tokenizer))
    if len(token_ids) > longest:
        raise InputError(
            f"the prompt has {len(token_ids)} tokens, and the model's context leaves {longest} beside max_completion_length; shorten "
            "it, or lower max_completion_length"
        )
    return Prompt(text, token_ids, record, _judged_by(record, rewards))


def judges(prompt: Prompt, reward: str) -> bool:
    """Whether the reward of that name judges samples of the prompt."""
    return prompt.judged_by is None or reward in prompt.judged_by


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


def _judged_by(row: Mapping[str, Any], rewards: Collection[str] | None) -> frozenset[str] | None:
    names = row.get("judged_by")
    if rewards is None or names is None:
        return None
    if not isinstance(names, list) or not names or not all(name in rewards for name in names):
        raise InputError(f"judged_by is {names!r}, it must be a list of rewards of this run: {', '.join(rewards)}")
    return frozenset(names)


def _prompt_text(row: Any, tokenizer: Tokenizer, template: str | None) -> str:
    prompt: Any = row.get("prompt") if isinstance(row, dict) else None
    messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt)
    if not isinstance(prompt, str) and not messages:
        raise InputError("the row has no prompt; it needs the field prompt, a text or a list of messages")
    return render_prompt(prompt, tokenizer, template)
