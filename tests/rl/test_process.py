"""Process supervision: from steps in the text to advantages of tokens, by hand and in a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finback.config import InputError
from finback.rewards.channel import Report
from finback.rewards.reward import Outcome, Score, outcome_of
from finback.rl.advantages import last_token, process_supervision
from finback.rl.batch import Batch
from finback.rl.config import GRPOConfig
from finback.rl.prompts import Prompt
from finback.rl.rollout import Completion, Rollout
from finback.rl.train import grpo
from finback.train.metrics import read_metrics
from tests.rl.policies import grpo_config

STEPS = '''
def words(prompt, completion, example):
    """Each word is a step: 1 if it begins with a vowel."""
    steps, end = [], 0
    for word in completion.split(" "):
        end += len(word) + 1
        steps.append((min(end, len(completion)), float(word[:1].lower() in "aeiou" and bool(word))))
    last = [step for step in steps if step[0] > 0]
    return [step for place, step in enumerate(last) if place == len(last) - 1 or step[0] < last[place + 1][0]] or [(1, 0.0)]

def beyond(prompt, completion, example):
    return [(10 ** 6, 1.0)]

def number(prompt, completion, example):
    return 1.0
'''


def _completion(text: str, lengths: list[int], steps: list[tuple[int, float]]) -> Completion:
    score = Score(0.0, {"steps": 0.0}, {}, {"steps": tuple(steps)})
    return Completion(Prompt("", [1], {}), list(range(len(lengths))), [0.0] * len(lengths), text, "stop", score, lengths)


def test_a_step_ends_with_the_token_that_completes_it():
    completion = _completion("one two", [1, 3, 3, 5, 7, 7], [])  # the third token is half a character, the last one the end
    assert [last_token(completion, end) for end in range(1, 8)] == [0, 1, 1, 3, 3, 4, 5]


def test_advantages_of_tokens_by_hand():
    first = _completion("ab cd", [2, 3, 5, 5], [(3, 1.0), (5, 0.0)])  # tokens 1 and 3: the end token belongs to the last step
    second = _completion("xyz", [1, 2, 3], [(1, 1.0), (2, 1.0), (3, 0.0)])
    deviation = math.sqrt(0.24)  # of 1, 0, 1, 1, 0 around 0.6
    good, bad = 0.4 / deviation, -0.6 / deviation
    equal = [_completion("ab", [1, 2], [(2, 1.0)]) for _ in range(2)]
    found = process_supervision(Rollout([[first, second], equal], 0.0, 0.0), "steps")
    assert found.spread.tolist() == [True, False]
    rows = [own.tolist() for own in found.of_samples if isinstance(own, torch.Tensor)]
    assert rows[0] == pytest.approx([good + bad, good + bad, bad, bad])
    assert rows[1] == pytest.approx([2 * good + bad, good + bad, bad])
    assert rows[2] == rows[3] == [0.0, 0.0]
    batch = Batch([first, second], found.of_samples[:2], 0, torch.device("cpu"))
    assert batch.advantages.shape == (2, 4)
    assert batch.advantages[1].tolist() == pytest.approx([2 * good + bad, good + bad, bad, 0.0])


@pytest.mark.parametrize("steps", [[(0, 1.0), (2, 1.0)], [(2, 1.0), (2, 0.0)], [(1, 1.0), (9, 1.0)]])
def test_steps_that_do_not_fit_the_text_count_nothing_and_are_told(steps: list[tuple[int, float]]):
    wrong, right = _completion("abcd", [2, 4], steps), _completion("abcd", [2, 4], [(2, 1.0), (4, 0.0)])
    found = process_supervision(Rollout([[wrong, right]], 0.0, 0.0), "steps")
    rows = [own.tolist() for own in found.of_samples if isinstance(own, torch.Tensor)]
    assert rows == [[0.0, 0.0], pytest.approx([0.0, -1.0])]
    assert wrong.score is not None
    assert "which must rise from 1 to 4" in wrong.score.failures["steps"]


def test_steps_come_back_from_the_reward_processes():
    outcome = outcome_of(lambda prompt, completion, example: [(2, 1), [5, -0.5]], "", "", {})  # type: ignore[arg-type, return-value]
    assert outcome == Outcome(0.5, steps=((2, 1.0), (5, -0.5)))
    assert Report.decode(Report(3, 1, outcome).encode()) == Report(3, 1, outcome)
    for value in ([], [(1, 2, 3)], [(1.5, 1.0)], [(1, math.nan)], ["ab"]):
        failed = outcome_of(lambda prompt, completion, example, value=value: value, "", "", {})  # type: ignore[misc, arg-type, return-value]
        assert failed.failure == "not_a_number"


def _config(tmp_path: Path, function: str, **changes: object) -> GRPOConfig:
    config = grpo_config(tmp_path)
    (tmp_path / "steps_of_the_test.py").write_text(STEPS, encoding="utf-8")
    return replace(config, reward=(), process_reward=f"{tmp_path / 'steps_of_the_test.py'}:{function}", **changes)  # type: ignore[arg-type]


def test_a_policy_learns_from_its_steps(tmp_path: Path):
    config = _config(tmp_path, "words", steps=14, num_generations=8, max_completion_length=8, samples_per_step=4)
    grpo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward/words"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    assert all(row["failed_rewards"] == 0 for row in rows)
    samples = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(samples[0])["components"].keys() == {"words"}


@pytest.mark.parametrize("function", ["beyond", "number"])
def test_a_function_without_sound_steps_teaches_nothing(tmp_path: Path, function: str):
    grpo(_config(tmp_path, function, steps=1), tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["zero_variance"] == 1.0
    assert row["failed_rewards"] == 1.0


def test_the_sequence_level_loss_cannot_tell_steps_apart():
    with pytest.raises(InputError, match="field process_reward rewards steps, which loss sequence cannot tell apart"):
        GRPOConfig(model="", loss="sequence", process_reward="a:b")
