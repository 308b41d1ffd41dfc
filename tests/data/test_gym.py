"""reasoning-gym's problems in our form."""

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from finback.config import InputError
from finback.data.fetch import fetch
from finback.data.gym import gym_problems, gym_rows
from finback.data.items import find_item
from finback.data.problems import is_held_out


def test_problems() -> None:
    problems = list(gym_problems("chain_sum", 60, seed=3, max_terms=3))
    assert len(problems) == 60
    assert problems == list(gym_problems("chain_sum", 60, seed=3, max_terms=3))
    for problem in problems:
        expression = problem.question.rpartition(": ")[2].removesuffix("=")
        assert eval(expression) == int(problem.answer)
        assert problem.reasoning == ""
        assert problem.family == "gym/chain_sum"
        assert not is_held_out(problem.question)
    held_out = list(gym_problems("chain_sum", 20, seed=3, max_terms=3, held_out=True))
    assert len(held_out) == 20  # more than one block of entries was needed
    assert all(is_held_out(problem.question) for problem in held_out)


def test_rows_are_the_same_problems_with_their_entries() -> None:
    rows = list(gym_rows("chain_sum", 12, seed=3, held_out=True))
    problems = list(gym_problems("chain_sum", 12, seed=3, held_out=True))
    assert [(row["question"], row["answer"], row["family"]) for row in rows] == [
        (p.question, p.answer, p.family) for p in problems
    ]
    assert all(row["gym"]["entry"]["question"].strip() == row["prompt"] for row in rows)
    (cube,) = gym_rows("rubiks_cube", 1)  # many right answers
    assert cube["answer"] is None
    assert cube["gym"]["family"] == "rubiks_cube"


def test_worked_solutions_where_the_family_has_them() -> None:
    for problem in gym_problems("gsm_symbolic", 20, seed=1):
        assert problem.reasoning
        assert "####" not in problem.reasoning
        assert problem.text.startswith("Question: ")


def test_mistakes() -> None:
    with pytest.raises(InputError, match="no family 'chain_sun'; did you mean 'chain_sum'"):
        next(gym_problems("chain_sun", 1))
    with pytest.raises(InputError, match="chain_sum does not take"):
        next(gym_problems("chain_sum", 1, depth=3))
    with pytest.raises(InputError, match=r"chain_sum does not take .*min_terms must be positive"):
        next(gym_problems("chain_sum", 1, min_terms=-3))
    with pytest.raises(InputError, match="rubiks_cube has no single answer"):
        next(gym_problems("rubiks_cube", 1))


def test_finback_fetch_has_it_made(tmp_path: Path) -> None:
    directory = fetch(find_item("reasoning-gym"), tmp_path)
    rows, held_out = (
        [json.loads(line) for line in (directory / name).read_text().splitlines()] for name in ("text.jsonl", "held-out.jsonl")
    )
    assert (len(rows), len(held_out)) == (8000, 400)
    assert Counter(row["family"] for row in rows)["gym/gsm_symbolic"] == 4000
    assert all(("<think>" in row["text"]) == (row["family"] == "gym/gsm_symbolic") for row in rows)
    assert not {row["question"] for row in held_out} & {row["question"] for row in rows}
    assert "Apache-2.0" in json.loads((directory / "fetched.json").read_text())["licence"]
