"""A verb's words: what they fill, and how a mistake in them reads."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from finback.commands.parse import parse_arguments
from finback.config import InputError


@dataclass(frozen=True)
class Optimizer:
    """Nested options."""

    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise InputError(f"field lr is {self.lr}, it must be above 0")


@dataclass(frozen=True)
class Train:
    """Options of a verb."""

    preset: tyro.conf.Positional[str]
    """Which preset."""
    steps: int = 5
    """Optimizer steps."""
    save_every: int = 5
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = field(default_factory=Optimizer)


def parse(line: str, default: Train | None = None) -> Train:
    return parse_arguments(Train, line.split(), verb="train", default=default)


def test_words_fill_fields():
    assert parse("tiny --steps 7 --optimizer.lr 0.5") == Train("tiny", steps=7, optimizer=Optimizer(lr=0.5))


def test_underscores_are_as_good_as_dashes():
    assert parse("tiny --save_every 7") == Train("tiny", save_every=7)


def test_defaults_may_be_given():
    preset = Train("small", steps=100, optimizer=Optimizer(warmup_steps=3))
    assert parse("--save-every 2", preset) == Train("small", 100, 2, optimizer=Optimizer(warmup_steps=3))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("tiny --stepz 4", "unknown field --stepz; the nearest is --steps"),
        ("tiny --step=4", "unknown field --step; the nearest is --steps"),
        ("tiny --save_evry 4", "unknown field --save_evry; the nearest is --save-every"),
        ("tiny --lr 4", "unknown field --lr; the nearest is --optimizer.lr"),
        ("tiny --optimiser.warmup 4", "unknown field --optimiser.warmup; the nearest is --optimizer.warmup-steps"),
        ("--stepz=4 tiny", "unknown field --stepz; the nearest is --steps"),
        ("--stepz=4", "unknown field --stepz; the nearest is --steps"),
        ("tiny small", "unexpected word 'small'"),
        ("tiny --steps many", "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (
            "tiny --precision fp9",
            "invalid choice 'fp9' for argument '--precision'. Expected one of ('fp32', 'bf16')",
        ),
        ("tiny --steps", "Missing value for argument '--steps'. Expected 1 values"),
        ("", "PRESET is missing: Which preset"),
        ("tiny --optimizer.lr -1", "field lr is -1.0, it must be above 0"),
    ],
)
def test_a_mistake_is_one_sentence(line: str, sentence: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError) as told:
        parse(line)
    assert str(told.value) == f"{sentence}; see finback train --help"
    assert capsys.readouterr() == ("", "")


def test_help_shows_field_type_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: finback train [-h]")
    assert "PRESET" in printed
    assert "--steps INT" in printed
    assert "Optimizer steps. (default: 5)" in printed


def test_help_shows_the_given_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--help", Train("small", steps=123))
    assert "(default: 123)" in capsys.readouterr().out


def test_a_mistake_reads_the_same_on_a_terminal_without_box_characters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(InputError, match=r"^invalid choice 'fp9' for argument '--precision'\. Expected one of"):
        parse("tiny --precision fp9")
    with pytest.raises(InputError, match=r"^unknown field --stepz; the nearest is --steps;"):
        parse("tiny --stepz 9")


@dataclass(frozen=True)
class Inner:
    cache: Path = Path("cache")


@dataclass(frozen=True)
class Paths:
    """Fields that are paths, and two that have no default."""

    source: tyro.conf.Positional[Path]
    """What to read; a directory."""
    prompt: str
    """Text to continue."""
    out: Path | None = None
    inner: Inner = Inner()


@dataclass(frozen=True)
class Listed:
    judges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Several:
    """Fields that take several values: behind one flag, or one behind each."""

    reward: tuple[str, ...] = ()
    most_steps: int = 1
    added: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    flat: Annotated[Listed, tyro.conf.arg(name="")] = Listed()
    inner: Listed = Listed()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--reward a --reward b", "--reward is given twice; put its values behind one --reward"),
        ("--reward a --most-steps 3 --reward=b --reward=c", "--reward is given twice; put its values behind one --reward"),
        ("--judges a --judges b", "--judges is given twice; put its values behind one --judges"),
        ("--inner.judges a --inner.judges b", "--inner.judges is given twice; put its values behind one --inner.judges"),
        ("--most-steps 3 --most_steps 4", "--most-steps is given twice; give it once"),
    ],
)
def test_a_flag_that_comes_again_drops_nothing_silently(line: str, sentence: str):
    with pytest.raises(InputError) as told:
        parse_arguments(Several, line.split(), verb="several")
    assert str(told.value) == sentence


def test_values_stand_behind_one_flag_or_one_behind_each_where_that_adds_up():
    line = "--reward a b --added c --added d --judges e --inner.judges f g"
    filled = parse_arguments(Several, line.split(), verb="several")
    assert filled == Several(("a", "b"), added=("c", "d"), flat=Listed(("e",)), inner=Listed(("f", "g")))


def test_each_field_that_is_missing_is_named_with_its_meaning():
    with pytest.raises(InputError) as told:
        parse_arguments(Paths, [], verb="paths")
    expected = "SOURCE is missing: What to read; a directory; --prompt is missing: Text to continue; see finback paths --help"
    assert str(told.value) == expected


def test_a_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/whale")
    filled = parse_arguments(Paths, ["~/a", "--prompt", "~/b", "--out=~/c", "--inner.cache", "~"], verb="paths")
    assert filled == Paths(Path("/home/whale/a"), "~/b", Path("/home/whale/c"), Inner(Path("/home/whale")))
    same = Paths(Path("~nobody-of-this-name/a"), "x")
    assert parse_arguments(Paths, ["~nobody-of-this-name/a", "--prompt", "x"], verb="paths") == same


@pytest.mark.parametrize("columns", [30, 60, 120, 240, 480])
def test_a_mistake_reads_the_same_on_a_terminal_of_any_width(columns: int, monkeypatch: pytest.MonkeyPatch):
    """On a wide one tyro's boxes stand side by side."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for line, sentence in (
        ("tiny --optimizer.lr -1 --steps 4", "field lr is -1.0, it must be above 0"),
        ("tiny --stepz 4", "unknown field --stepz; the nearest is --steps"),
        ("tiny --warmup-steps 4", "unknown field --warmup-steps; the nearest is --optimizer.warmup-steps"),
        ("", "PRESET is missing: Which preset"),
    ):
        with pytest.raises(InputError) as told:
            parse(line)
        assert str(told.value) == f"{sentence}; see finback train --help"
