"""reasoning-gym's scorers through our reward."""

import importlib.util

import pytest

from finback.config import InputError
from finback.rewards.gym import gym_score

if importlib.util.find_spec("reasoning_gym") is None:
    pytest.skip("reasoning-gym is not installed", allow_module_level=True)


def entries(family: str, count: int = 5):
    import reasoning_gym

    return reasoning_gym.create_dataset(family, size=count, seed=4)


@pytest.mark.parametrize("family", ["chain_sum", "gcd", "number_sorting", "countdown"])
def test_its_own_answers_are_right_and_others_are_not(family: str) -> None:
    for entry in entries(family):
        example = {"gym": {"family": family, "entry": entry}}
        assert gym_score(entry["question"], f"<think>hm</think><answer>{entry['answer']}</answer>", example) == 1.0
        assert gym_score(entry["question"], f"<think><answer>{entry['answer']}</answer></think>so", example) == 0.0
        assert gym_score(entry["question"], "<answer>none of it</answer>", example) < 0.1
        short = {"answer": entry["answer"], "gym": {"family": family, "metadata": entry["metadata"]}}
        assert gym_score(entry["question"], f"<answer>{entry['answer']}</answer>", short) == 1.0


def test_another_right_answer_is_right_too() -> None:
    """Countdown asks for any expression that reaches the target; the reference names one."""
    entry = {"question": "?", "answer": "1 + 2", "metadata": {"numbers": [2, 1], "target": 3}}
    assert gym_score("?", "<answer>2 + 1</answer>", {"gym": {"family": "countdown", "entry": entry}}) == 1.0


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        ({}, 'the row has no "gym"'),
        ({"gym": {"entry": {}}}, 'the row has no "gym"'),
        ({"gym": {"family": "chain_sum"}}, 'neither an "entry" nor "metadata"'),
        ({"gym": {"family": "chain_sun", "entry": {}}}, "no family 'chain_sun'; did you mean 'chain_sum'"),
    ],
)
def test_a_row_without_a_problem_of_the_gym_is_told(example: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        gym_score("?", "<answer>1</answer>", example)
