"""GRPO against PPO: the same task for both, and a critic that costs what it weighs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.ppo import compare, estimate_mebibytes, held_out_accuracy, vowels, write_task
from finback.config import count_params
from finback.engine.llm import LLM
from finback.eval.result import TaskResult
from finback.eval.runner import evaluate_answers
from finback.eval.task import Task
from finback.model.checkpoint import open_checkpoint


def test_the_formula_charges_ppo_with_a_critic(tmp_path: Path) -> None:
    config = write_task(tmp_path)
    model = open_checkpoint(config.model).config
    extra = estimate_mebibytes("ppo", config) - estimate_mebibytes("grpo", config)
    assert extra * 2**20 == pytest.approx(16 * (count_params(model).total - model.vocab_size * model.hidden_size))


def test_the_toy_task_by_hand() -> None:
    assert vowels("", "ab, e!", {}) == pytest.approx(2 / 3)
    assert vowels("", "...", {}) == 0.0


def test_accuracy_is_that_of_held_out_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = write_task(tmp_path), []

    def seen(llm: LLM, task: Task, *more: Any) -> TaskResult:
        asked.extend(example["prompt"] for example in task.examples)
        return evaluate_answers(llm, replace(task, examples=task.examples[:2]), *more)

    monkeypatch.setattr("bench.ppo.evaluate_answers", seen)
    value, low, high = held_out_accuracy(config.model, config)
    assert 0 <= low <= value <= high <= 1
    assert value < 0.5  # letters of an untrained model
    trained = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert asked
    assert not set(asked) & set(trained)


@pytest.mark.slow
def test_both_are_measured_in_one_run() -> None:
    rows = compare(steps=30)
    assert rows["ppo"]["peak_mebibytes_above_start"] > rows["grpo"]["peak_mebibytes_above_start"]
    assert all(row["last_reward"] > row["first_reward"] for row in rows.values())
    assert all(row["accuracy"][1] > row["accuracy_before"][2] for row in rows.values())
