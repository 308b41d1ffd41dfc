"""One call that turns a verb's words into its dataclass, and any mistake in them into one sentence."""

import contextlib
import difflib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from finback.config import InputError

Fields = TypeVar("Fields")

_MARKERS = (tyro.conf.PositionalMetavarFromFieldName,)


def parse_arguments(
    fields: type[Fields],
    argv: Sequence[str],
    *,
    verb: str,
    description: str | None = None,
    default: Fields | None = None,
) -> Fields:
    """Fill the dataclass `fields` from the words after `finback VERB`.

    `default` gives the values of fields that are not on the line (a preset, say); without it the dataclass's own
    defaults hold. The docstring under each field is its help. `--help` prints and leaves with SystemExit(0).

    Raises:
        InputError: a word that is no field (the nearest one is named), a missing field or a value of the wrong type.
    """
    prog = f"finback {verb}"
    start = tyro.MISSING_NONPROP if default is None else default
    messages = io.StringIO()
    filled: Fields
    unknown: list[str]
    try:
        with contextlib.redirect_stderr(messages):
            filled, unknown = tyro.cli(
                fields,
                prog=prog,
                description=description,
                args=list(argv),
                config=_MARKERS,
                return_unknown_args=True,
                default=start,
            )
    except SystemExit as leaving:
        if leaving.code == 0:
            raise
        flags = _flags(fields, default)
        unknown = [word for word in argv if word.startswith("--") and _name(word) not in flags]
        sentence = _unknown_word(unknown[0], flags) if unknown else _sentence(messages.getvalue())
        raise InputError(f"{sentence}; see {prog} --help") from None
    if unknown:
        raise InputError(f"{_unknown_word(unknown[0], _flags(fields, default))}; see {prog} --help")
    return filled


def _name(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _flags(fields: type[Fields], default: Fields | None) -> list[str]:
    """Every `--flag` of `fields`, read from its help: the first words of the lines inside tyro's boxes."""
    page = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(fields, args=["--help"], config=_MARKERS, default=start)
    starts = (re.match(r"[│|\s]*(--[\w.-]+(?:, --[\w.-]+)*)", line) for line in page.getvalue().splitlines())
    return [flag for start in starts if start for flag in start[1].split(", ")]


def _unknown_word(word: str, flags: list[str]) -> str:
    """Say that `word` is no field, and name the flag most like it, by its whole name or the part after its last dot."""
    if not word.startswith("-"):
        return f"unexpected word {word!r}"
    likeness = difflib.SequenceMatcher(a=_name(word).lstrip("-"))

    def score(flag: str) -> float:
        ratios = []
        for candidate in (flag.lstrip("-"), flag.rsplit(".", 1)[-1].lstrip("-")):
            likeness.set_seq2(candidate)
            ratios.append(likeness.ratio())
        return max(ratios)

    nearest = max(flags, key=score, default=None)
    return f"unknown field {word.partition('=')[0]}" + (f"; the nearest is {nearest}" if nearest else "")


def _sentence(box: str) -> str:
    """The message inside tyro's box: the words between its title and its first rule (or bottom edge)."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        inside = line.strip("│| ")
        if inside.strip("╰╯─-"):
            words += inside.split()
        elif words:
            break
    return " ".join(words).rstrip(".")
