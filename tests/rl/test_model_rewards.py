"""Reward models in GRPO: what they are given to read, what becomes of their scores, and which rows they judge."""

import json
import math
from pathlib import Path

import pytest
import torch

from finback.config import InputError
from finback.rewards.reward import Score
from finback.rl.model_rewards import ModelReward, absolute_spec, add_model_scores, model_reward_names, split_spec
from finback.rl.prompts import Prompt
from finback.rl.rollout import Completion
from finback.rl.train import grpo
from finback.train.metrics import read_metrics
from finback.train.reward_scoring import load_reward_model
from tests.rl.policies import grpo_config, write_reward_model


def test_a_spec_is_a_directory_with_a_weight():
    assert split_spec("runs/rm") == ("runs/rm", 1.0)
    assert split_spec("runs/rm:0.5") == ("runs/rm", 0.5)
    assert split_spec("C:runs") == ("C:runs", 1.0)
    assert absolute_spec("/runs/rm:-2") == "/runs/rm:-2"
    with pytest.raises(InputError, match="the weight is nan, it must be finite"):
        split_spec("runs/rm:nan")


def test_models_are_named_by_their_runs():
    specs = ("/a/helpful/checkpoints/step-9:2", "/b/helpful", "/c/safe", "/d/exact")
    assert model_reward_names(specs, ["exact"]) == ["helpful", "helpful-2", "safe", "exact-2"]


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_scores_are_added_to_the_rules(tmp_path: Path, kind: str):
    judge = write_reward_model(tmp_path / "judge", kind)
    config = grpo_config(tmp_path, reward_model=(f"{judge}:0.5",), steps=2, samples_per_step=4)
    grpo(config, tmp_path / "run")
    model = load_reward_model(judge)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    questions = [sample["prompt"].removeprefix("Q: ").removesuffix("\nA:") for sample in samples]
    expected = model.score(questions, [sample["completion"] for sample in samples])
    for sample, value in zip(samples, expected, strict=True):
        assert sample["components"]["judge"] == pytest.approx(value, abs=1e-5)
        assert sample["reward"] == pytest.approx(sample["components"]["vowels"] + 0.5 * value, abs=1e-5)
    assert len({round(value, 4) for value in expected}) > 2
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["reward"] == pytest.approx(row["reward/vowels"] + 0.5 * row["reward/judge"])


def test_a_reward_model_alone_is_learnt_from(tmp_path: Path):
    judge = write_reward_model(tmp_path / "judge", "pointwise")
    grpo(grpo_config(tmp_path, reward_model=(str(judge),), steps=1), tmp_path / "run")
    alone = grpo_config(tmp_path, reward_model=(str(judge),), steps=10, num_generations=8)
    alone = type(alone).from_dict(alone.to_dict() | {"reward": []})
    grpo(alone, tmp_path / "alone")
    rewards = [row["reward"] for row in read_metrics(tmp_path / "alone" / "metrics.jsonl")]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def _scored(tmp_path: Path, kind: str, prompt: str, texts: list[str]) -> list[float]:
    directory = tmp_path / kind
    reward_model = load_reward_model(directory if directory.exists() else write_reward_model(directory, kind))
    read = Prompt(prompt, [1], {"prompt": "count"})
    completions = [Completion(read, text=text, score=Score(1.0, {"rule": 1.0})) for text in texts]
    add_model_scores(completions, [ModelReward("judge", reward_model, 2.0)])
    for completion in completions:
        assert completion.score is not None
        assert completion.score.total == pytest.approx(1.0 + 2.0 * completion.score.components["judge"])
    return [completion.score.components["judge"] for completion in completions if completion.score is not None]


def test_a_helpful_model_reads_the_answer_alone_and_a_safe_one_everything(tmp_path: Path):
    texts = ["one fish\n</think>\nblue fish", "red red red\n</think>\nblue fish", "blue fish"]
    helpful = _scored(tmp_path, "pairwise", "Q: <think>\n", texts)
    assert helpful[0] == pytest.approx(helpful[1])
    assert helpful[0] != pytest.approx(helpful[2])  # a thought that has not ended holds no answer, though the prompt opened it
    assert helpful[2] == pytest.approx(_scored(tmp_path, "pairwise", "Q:", [""])[0])
    safe = _scored(tmp_path, "pointwise", "Q: <think>\n", texts)
    assert len({round(value, 5) for value in safe}) == 3


def test_a_score_that_is_no_number_counts_nothing_and_is_told(tmp_path: Path):
    reward_model = load_reward_model(write_reward_model(tmp_path / "judge", "pointwise"))
    with torch.no_grad():
        reward_model.head.bias.fill_(math.nan)
    completion = Completion(Prompt("Q:", [1], {"prompt": "count"}), text="fish", score=Score(1.0, {"rule": 1.0}))
    add_model_scores([completion], [ModelReward("judge", reward_model, 2.0)])
    assert completion.score == Score(1.0, {"rule": 1.0, "judge": 0.0}, {"judge": "gave nan, not a finite number"})


def test_rows_name_the_rewards_that_judge_them(tmp_path: Path):
    judge = write_reward_model(tmp_path / "judge", "pointwise")
    config = grpo_config(tmp_path, reward_model=(str(judge),), steps=3, samples_per_step=4)
    rows = [{"prompt": f"count {i} fish", "judged_by": ["vowels"] if i % 2 else ["judge"]} for i in range(12)]
    Path(config.data[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    grpo(config, tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        odd = int(sample["prompt"].split()[2]) % 2
        assert list(sample["components"]) == ["vowels" if odd else "judge"]
        assert sample["reward"] == pytest.approx(next(iter(sample["components"].values())))
    rows[3]["judged_by"] = ["consonants"]
    Path(config.data[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError, match=r"line 4: judged_by is \['consonants'\], it must be a list of rewards of .* vowels, judge"
    ):
        grpo(config, tmp_path / "other")


def test_a_directory_without_a_reward_model_is_told_before_anything_is_written(tmp_path: Path):
    config = grpo_config(tmp_path)
    config = grpo_config(tmp_path, reward_model=(config.model,))
    with pytest.raises(InputError, match=r"holds no reward model .* make one with finback reward-model"):
        grpo(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
