"""Rewards by their specs, and what becomes of what a reward function does."""

import math
import textwrap
from fractions import Fraction
from pathlib import Path

import numpy
import pytest

from finback.config import InputError
from finback.rewards.answers import exact
from finback.rewards.reward import Outcome, Reward, Score, compose, load_reward, load_rewards, outcome_of, score


def written(directory: Path, source: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


@pytest.mark.parametrize(("ending", "weight"), [("", 1.0), (":0.5", 0.5), (":-2", -2.0), (":0", 0.0), (":1e-1", 0.1)])
def test_a_spec_names_a_function_and_its_weight(ending: str, weight: float) -> None:
    spec = f"finback.rewards.answers:exact{ending}"
    assert load_reward(spec) == Reward("exact", exact, weight, spec)


def test_a_spec_may_be_a_file(tmp_path: Path) -> None:
    written(tmp_path, "LENGTH = 3\n", "beside.py")
    path = written(
        tmp_path, "from beside import LENGTH\ndef near(prompt, completion, example): return len(completion) / LENGTH\n"
    )
    reward = load_reward(f"{path}:near:2")
    assert (reward.name, reward.weight) == ("near", 2.0)
    assert reward.function("", "abcdef", {}) == 2.0
    assert load_reward(f"{path}:near").function is reward.function


def test_a_module_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    written(tmp_path, "def one(prompt, completion, example): return 1.0\n", "module_of_the_working_directory.py")
    assert load_reward("module_of_the_working_directory:one").function("", "", {}) == 1.0


SOURCE = """
    VALUE = 3
    def matches(prompt, completion, example): return 1.0
    def two(prompt, completion): return 1.0
    def optional(prompt, completion, example, extra=1, *more, **words): return 1.0
    def keyword(prompt, completion, example, *, extra): return 1.0
"""


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("exact", "'exact' is not of the form module:function"),
        (":exact", "is not of the form"),
        ("FILE:", "is not of the form"),
        ("FILE:a.b", "is not of the form"),
        ("finback.rewards.answer:exact", r"no module 'finback.rewards.answer'; did you mean 'finback.rewards.answers'\?"),
        ("nowhere.at_all:exact", "no module 'nowhere' on Python's path or in the working directory"),
        ("FOLDER/none.py:exact", "there is no file '.*none.py'"),
        ("FILE:match", r"mine.py has no function 'match'; did you mean 'matches'\?"),
        ("finback.rewards.answers:exat", r"answers.py has no function 'exat'; did you mean 'exact'\?"),
        ("FILE:VALUE", "VALUE of .*mine.py is no function but int"),
        ("FILE:two", "two must take three arguments: prompt, completion, example"),
        ("FILE:keyword", "keyword must take three arguments"),
        ("FILE:matches:much", "the weight 'much' is not a number"),
        ("FILE:matches:", "the weight '' is not a number"),
        ("FILE:matches:nan", "the weight is nan, it must be finite"),
        ("FILE:matches:inf", "it must be finite"),
    ],
)
def test_a_mistake_in_a_spec_is_one_sentence(tmp_path: Path, spec: str, sentence: str) -> None:
    path = written(tmp_path, SOURCE)
    with pytest.raises(InputError, match=sentence):
        load_reward(spec.replace("FILE", str(path)).replace("FOLDER", str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def broken(", "running .*broken.py raised SyntaxError: "),
        ("1 / 0", "running .*broken.py raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "running .*broken.py raised SystemExit: 3"),
        ("import package_that_is_not_there", "needs the Python package 'package_that_is_not_there', which is not installed"),
    ],
)
def test_a_module_that_cannot_run_is_told(tmp_path: Path, source: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, source, "broken.py")
    for _ in range(2):  # the second time is no better
        with pytest.raises(InputError, match=sentence):
            load_reward(f"{path}:anything")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=sentence.replace(r"running .*broken.py", "importing broken")):
        load_reward("broken:anything")


def test_optional_parameters_do_not_matter(tmp_path: Path) -> None:
    assert load_reward(f"{written(tmp_path, SOURCE)}:optional").name == "optional"
    assert load_reward("builtins:max").name == "max"  # it has no signature that could be asked


def test_rewards_of_one_name_are_called_by_their_modules(tmp_path: Path) -> None:
    one, other = (written(tmp_path, SOURCE, f"{name}.py") for name in ("one", "other"))
    rewards = load_rewards([f"{one}:matches", f"{other}:matches:2", "finback.rewards.answers:exact"])
    assert [(reward.name, reward.weight) for reward in rewards] == [("one.matches", 1.0), ("other.matches", 2.0), ("exact", 1.0)]
    with pytest.raises(InputError, match="two rewards are called"):
        load_rewards([f"{one}:matches", f"{one}:matches:2"])
    with pytest.raises(InputError, match="no reward is given"):
        load_rewards([])


def returning(value: object):
    return lambda prompt, completion, example: value


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (-0.5, -0.5), (True, 1.0), (False, 0.0), (Fraction(1, 4), 0.25), (numpy.float32(0.5), 0.5), (numpy.int64(3), 3.0)],
)
def test_every_finite_number_is_a_value(value: object, number: float) -> None:
    outcome = outcome_of(returning(value), "", "", {})
    assert outcome == Outcome(number)
    assert type(outcome.value) is float


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (math.nan, "gave nan, not a finite number"),
        (-math.inf, "gave -inf, not a finite number"),
        (numpy.float32("inf"), "gave inf, not a finite number"),
        (10**400, "gave inf, not a finite number"),
        (None, "gave NoneType None, not a number; return a float"),
        ("1.0", "gave str '1.0', not a number; return a float"),
        (1j, "gave complex 1j, not a number; return a float"),
        ([1.0], "gave list [1.0], not a number; return a float"),
    ],
)
def test_anything_else_is_a_failure(value: object, sentence: str) -> None:
    assert outcome_of(returning(value), "", "", {}) == Outcome(0.0, "not_a_number", sentence)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (ValueError("bad\n  thing"), "raised", "raised ValueError: bad thing"),
        (KeyError("answer"), "raised", "raised KeyError: 'answer'"),
        (ValueError(), "raised", "raised ValueError"),
        (SystemExit(0), "raised", "raised SystemExit: 0"),
        (Unspeakable(), "raised", "raised Unspeakable: (which cannot be shown)"),
        (MemoryError(), "out_of_memory", "needed more memory than a worker may have"),
    ],
)
def test_what_a_reward_raises_is_a_failure(error: BaseException, kind: str, sentence: str) -> None:
    def function(prompt: str, completion: str, example: object) -> float:
        raise error

    assert outcome_of(function, "", "", {}) == Outcome(0.0, kind, sentence)


def test_a_long_sentence_is_cut() -> None:
    outcome = outcome_of(returning("x" * 10_000), "", "", {})
    assert len(outcome.sentence) == 300


def test_ctrl_c_passes() -> None:
    def interrupted(prompt: str, completion: str, example: object) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcome_of(interrupted, "", "", {})


def test_the_total_is_the_weighted_sum_and_a_failure_counts_nothing() -> None:
    rewards = [Reward("a", returning(1.0), 2.0), Reward("b", returning(None), 5.0), Reward("c", returning(0.5), -1.0)]
    expected = Score(1.5, {"a": 1.0, "b": 0.0, "c": 0.5}, {"b": "gave NoneType None, not a number; return a float"})
    assert score(rewards, "p", "c", {}) == expected
    assert compose(rewards, [Outcome(1.0), Outcome(0.0, "timed_out", "timed out after 5 s"), Outcome(0.5)]).total == 1.5


def test_names_must_differ() -> None:
    with pytest.raises(InputError, match="two rewards are called 'a'"):
        score([Reward("a", returning(1.0)), Reward("a", returning(0.0))], "", "", {})
    with pytest.raises(InputError, match="no reward is given"):
        score([], "", "", {})
