"""PPO: advantages and losses by hand, and that the loop learns what GRPO learns."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finback
from finback.cli import main
from finback.config import InputError
from finback.rl.config import GRPOConfig, PPOConfig
from finback.rl.ppo import clipped_value_loss, generalised_advantages, token_rewards, whitened
from finback.rl.ppo_train import new_critic, ppo
from finback.rl.rollout import Rollout, roll_out
from finback.rl.session import read_run_config, write_run_config
from finback.train.checkpoint import find_damage
from finback.train.metrics import read_metrics
from finback.train.session import locked
from tests.rl.policies import TIMES, grpo_config

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_the_reward_stands_on_the_last_token():
    rewards = token_rewards(torch.tensor([2.0, -1.0]), MASK)
    assert rewards.tolist() == [[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0]]
    now, before = torch.tensor([[0.5, 0.0, 1.0], [0.0, 9.0, 9.0]]), torch.zeros(2, 3)
    rewards = token_rewards(torch.tensor([2.0, -1.0]), MASK, beta=0.1, log_probs=now, reference_log_probs=before)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.0, 1.9], [-1.0, 0.0, 0.0]]))


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.5], [1.0, 7.0, 7.0]])  # what stands outside of the mask must not matter
    # deltas of the first, gamma 0.5: -0.375, 0.0, 0.5; gamma lambda = 0.25
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.375 + 0.25 * 0.125, 0.125, 0.5], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.15625, 0.375, 1.0], [2.0, 0.0, 0.0]]))


def test_with_lambda_one_an_advantage_is_the_reward_to_come_less_the_value():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 3, generator=generator) for _ in range(2))
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    to_come = (rewards * MASK).flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(returns, to_come)
    torch.testing.assert_close(advantages, (to_come - values) * MASK)


def test_whitening_does_not_depend_on_the_cut():
    advantages = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
    (whole,) = whitened([advantages], [MASK])
    parts = whitened([advantages[:1], advantages[1:]], [MASK[:1], MASK[1:]])
    torch.testing.assert_close(torch.cat(parts), whole)
    assert float(whole[MASK].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whole[MASK].std(correction=0)) == pytest.approx(1.0)


def test_the_value_loss_by_hand():
    values = torch.tensor([[1.0, 0.1, 0.0], [2.0, 5.0, 5.0]], requires_grad=True)
    old, returns = torch.zeros(2, 3), torch.tensor([[3.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    loss = clipped_value_loss(values, old, returns, MASK, epsilon=0.2)
    # Held at 0.2: 2.8^2 is worse than 2^2, without a gradient. The others: 2.9^2, 1^2, 2^2.
    assert float(loss.detach()) == pytest.approx(0.5 * (2.8**2 + 2.9**2 + 1 + 4) / 4)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -2.9, -1.0], [2.0, 0.0, 0.0]]) / 4)


def _config(directory: Path, **changes: Any) -> PPOConfig:
    given = {"loss": "global-token", "freeze_mtp": True, **changes}
    return PPOConfig.from_dict(grpo_config(directory).to_dict() | given)


def test_the_policy_learns_and_the_critic_with_it(tmp_path: Path):
    config = _config(tmp_path, steps=12, num_generations=8, beta=0.001, critic_lr=5e-3)
    checkpoint = ppo(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    assert rows[-1]["value_loss"] < rows[0]["value_loss"]
    assert all(0 <= row["logprob_gap"] < 1e-3 for row in rows)
    assert finback.load(checkpoint, dtype=torch.float32).config.num_hidden_layers == 3


def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {"beta": 0.05, "reference_steps": 2, "minibatches": 2, "num_iterations": 2, "critic_lr": 5e-3}
    config = _config(tmp_path, steps=4, save_every=1, keep_checkpoints=0, **changes)
    whole = ppo(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 3):  # the run as it was after step 2: killed before it could write the next checkpoint
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    assert main(["ppo", "--resume", str(tmp_path / "cut")]) == 0
    assert "continuing" in capsys.readouterr().out
    resumed = tmp_path / "cut" / "checkpoints" / "step-4"
    first, second = (
        [
            {key: value for key, value in row.items() if key not in TIMES}
            for row in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert first == second
    for name in ("model.safetensors", "trainer.safetensors", "critic.safetensors", "critic.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    critics = [(tmp_path / "whole" / "checkpoints" / f"step-{step}" / "critic.safetensors").read_bytes() for step in (2, 4)]
    assert critics[0] != critics[1]
    assert "| loss of the critic |" in (tmp_path / "cut" / "report.md").read_text()


def test_a_second_process_leaves_what_the_first_is_writing(tmp_path: Path):
    config = _config(tmp_path, steps=1)
    ppo(config, tmp_path / "run")
    written = tmp_path / "run" / "checkpoints" / ".step-2.abc"
    written.mkdir()
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is training in"):
        ppo(config, tmp_path / "run", resume=True)
    assert written.is_dir()


def test_a_reward_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = _config(tmp_path, steps=1)
    ppo(replace(config, reward=(config.reward[0].replace("vowels", "fails"),)), tmp_path / "run")
    assert "the reward fails failed on 16 of 16 samples" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_ends_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def pressed(*words: Any, **more: Any) -> Rollout:
        os.kill(os.getpid(), signal.SIGINT)
        return roll_out(*words, **more)

    with monkeypatch.context() as patch:
        patch.setattr("finback.rl.ppo_train.roll_out", pressed)
        with pytest.raises(KeyboardInterrupt):
            ppo(_config(tmp_path, steps=2), tmp_path / "run")
    assert f"stopped after step 1; continue with: finback ppo --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-1") is None


def test_a_run_is_resumed_by_its_own_verb(tmp_path: Path):
    for kind in (PPOConfig, GRPOConfig):
        config = _config(tmp_path) if kind is PPOConfig else grpo_config(tmp_path)
        (tmp_path / kind.verb).mkdir()
        write_run_config(tmp_path / kind.verb, config)
        assert read_run_config(tmp_path / kind.verb, kind) == config
    with pytest.raises(InputError, match="another kind, not of finback ppo"):
        read_run_config(tmp_path / "grpo", PPOConfig)
    with pytest.raises(InputError, match="field gamma is not known"):
        read_run_config(tmp_path / "ppo", GRPOConfig)


def test_a_critic_is_a_second_model(tmp_path: Path):
    config = grpo_config(tmp_path)
    critic, policy = new_critic(config.model, torch.device("cpu")), finback.load(config.model, dtype=torch.float32)
    trained = sum(parameter.numel() for parameter in critic.parameters.values())
    expected = sum(p.numel() for p in policy.parameters()) - sum(p.numel() for m in policy.mtp_modules for p in m.parameters())
    assert trained == expected - policy.lm_head.weight.numel() + policy.config.hidden_size + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gae_lambda": 1.5}, r"field gae_lambda is 1\.5"),
        ({"critic_lr": 0.0}, r"field critic_lr is 0\.0, it must be a number above 0"),
        ({"process_reward": "a:b"}, "PPO learns from the field reward alone"),
        ({"loss": "token"}, "PPO's loss is the mean over tokens"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, changes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        _config(tmp_path, **changes)


def test_the_verb_needs_a_model_and_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ppo", "--out", str(tmp_path / "run")]) == 2
    assert "the model's directory is missing" in capsys.readouterr().err
    assert main(["ppo", "somewhere"]) == 2
    assert "--out is missing" in capsys.readouterr().err
