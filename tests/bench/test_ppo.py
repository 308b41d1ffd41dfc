"""GRPO against PPO: the same task for both, and a critic that costs what it weighs."""

from pathlib import Path

import pytest

from bench.ppo import compare, estimate_mebibytes, vowels, write_task
from finback.config import count_params
from finback.model.checkpoint import open_checkpoint


def test_the_formula_charges_ppo_with_a_critic(tmp_path: Path) -> None:
    config = write_task(tmp_path)
    model = open_checkpoint(config.model).config
    extra = estimate_mebibytes("ppo", config) - estimate_mebibytes("grpo", config)
    assert extra * 2**20 == pytest.approx(16 * (count_params(model).total - model.vocab_size * model.hidden_size))


def test_the_toy_task_by_hand() -> None:
    assert vowels("", "ab, e!", {}) == pytest.approx(2 / 3)
    assert vowels("", "...", {}) == 0.0


@pytest.mark.slow
def test_both_are_measured_in_one_run() -> None:
    rows = compare(steps=30)
    assert rows["ppo"]["peak_mebibytes_above_start"] > rows["grpo"]["peak_mebibytes_above_start"]
    assert all(row["last_reward"] > row["first_reward"] for row in rows.values())
