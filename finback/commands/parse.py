"""One call that turns a verb's words into its dataclass, and any mistake in them into one sentence."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from finback.config import InputError, nearest

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
    defaults hold. The docstring under each field is its help. `--help` prints and leaves with SystemExit(0). In paths, ~ is the
    user's home: shells replace it only where it begins a word, not in --out=~/run, nor inside quotes.

    Raises:
        InputError: a word that is no field (the nearest one is named), a missing field, a value of the wrong type, or a field that is
            given twice where each time would not add to it.
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
    _check_given_once(fields, argv)
    expanded: Fields = _with_home(filled)
    return expanded


def directory_to_resume(argv: Sequence[str]) -> str | None:
    """DIR of `--resume DIR`, which stands alone; None where the words begin a new run."""
    if not any(word.split("=")[0] == "--resume" for word in argv):
        return None
    words = [word for argument in argv for word in argument.split("=", 1)]
    if len(words) != 2 or words[0] != "--resume":
        raise InputError("--resume DIR stands alone: a run is continued with the fields that it was started with")
    return words[1]


def with_home(path: str) -> str:
    """`path` with the user's home for a leading ~; where there is no such user, as it is."""
    return os.path.expanduser(path)


def _with_home(filled: Any) -> Any:
    """Every `Path` in a dataclass, and in those inside it, by `with_home`."""
    changed = {}
    for field in dataclasses.fields(filled):
        value = getattr(filled, field.name)
        if isinstance(value, Path):
            new: Any = Path(with_home(str(value)))
        elif dataclasses.is_dataclass(value):
            new = _with_home(value)
        else:
            continue
        if new != value:
            changed[field.name] = new
    return dataclasses.replace(filled, **changed) if changed else filled


def _name(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _check_given_once(fields: type[Any], argv: Sequence[str]) -> None:
    """InputError for a flag that comes again: of several, all but the last would be dropped without a word."""
    hints = dict(_hints(fields))
    for flag, times in Counter(_name(word) for word in argv if word.startswith("--")).items():
        hint = hints.get(flag.rpartition(".")[2].lstrip("-"))
        if times > 1 and tyro.conf.UseAppendAction not in getattr(hint, "__metadata__", ()):
            once = f"put its values behind one {flag}" if "tuple[" in str(hint) else "give it once"
            raise InputError(f"{flag} is given twice; {once}")


def _hints(fields: type[Any]) -> Iterator[tuple[str, Any]]:
    """The name on the line and the type of each field of a dataclass, and of those of dataclasses inside it."""
    for name, hint in typing.get_type_hints(fields, include_extras=True).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(inner):
            yield from _hints(typing.cast(type[Any], inner))
        yield name.replace("_", "-"), hint


def _flags(fields: type[Fields], default: Fields | None) -> list[str]:
    """Every `--flag` of `fields`, read from its help: the first words of the lines inside tyro's boxes, which stand side by side
    where there is room."""
    page = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(fields, args=["--help"], config=_MARKERS, default=start)
    starts = re.findall(r"(?:^|[│|])[ \t]*(--[\w.-]+(?:, --[\w.-]+)*)", page.getvalue(), re.MULTILINE)
    return [flag for start in starts for flag in start.split(", ")]


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

    likest = max(flags, key=score, default=None)
    return f"unknown field {word.partition('=')[0]}" + (f"; the nearest is {likest}" if likest else "")


def _sentence(box: str) -> str:
    """The message inside tyro's box: the words between its title and its first rule (or bottom edge)."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        if line.strip("│|╰╯─- "):
            lines.append(line.strip("│|"))
        elif lines:
            break
    if lines and lines[0].strip().startswith("Missing from "):
        return _missing(lines[1:])
    sentence = " ".join(" ".join(lines).split()).rstrip(".")
    choice = re.fullmatch(r"(invalid choice '(.*)' for argument '.*'\. Expected one of )\((.*)\)", sentence, re.IGNORECASE)
    if choice:  # tyro lists None, which nobody types, and then in any order
        choices = [known for known in re.findall(r"'([^']*)'", choice[3]) if known != "None"]
        choices = sorted(choices) if "'None'" in choice[3] else choices
        return f"{choice[1]}({', '.join(map(repr, choices))}){nearest(choice[2], choices)}"
    # Of a whole dataclass tyro tells its own path; the sentence, from the dataclass's own check, names the field.
    return re.sub(r"^Error parsing [\w.]+: ", "", sentence)


def _missing(lines: Sequence[str]) -> str:
    """One clause for each field that was left out: names stand out by four columns, what they mean is below them."""
    clauses: list[str] = []
    least = min(len(line) - len(line.lstrip()) for line in lines)
    for line in lines:
        words = line.split()
        if len(line) - len(line.lstrip()) == least:
            clauses.append(f"{words[0]} is missing:")
        else:
            clauses[-1] += " " + " ".join(words)
    return "; ".join(clause.removesuffix("(required)").rstrip(" .:") for clause in clauses)
