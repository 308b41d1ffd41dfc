"""PPO: advantages and losses by hand, and that the loop learns what GRPO learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finback
from finback.config import InputError
from finback.rl.ppo import PPOSettings, clipped_value_loss, generalised_advantages, token_rewards, whitened
from finback.rl.ppo_train import new_critic, ppo
from finback.train.metrics import read_metrics
from tests.rl.policies import grpo_config

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


def test_the_policy_learns_and_the_critic_with_it(tmp_path: Path):
    config = grpo_config(tmp_path, steps=12, num_generations=8, beta=0.001)
    checkpoint = ppo(config, PPOSettings(critic_lr=5e-3), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
    assert rows[-1]["value_loss"] < rows[0]["value_loss"]
    assert finback.load(checkpoint, dtype=torch.float32).config.num_hidden_layers == 3


def test_a_critic_is_a_second_model(tmp_path: Path):
    config = grpo_config(tmp_path)
    critic, policy = new_critic(config.model, torch.device("cpu")), finback.load(config.model, dtype=torch.float32)
    trained = sum(parameter.numel() for parameter in critic.parameters.values())
    main = sum(p.numel() for p in policy.parameters()) - sum(p.numel() for m in policy.mtp_modules for p in m.parameters())
    assert trained == main - policy.lm_head.weight.numel() + policy.config.hidden_size + 1


def test_mistakes_are_told(tmp_path: Path):
    with pytest.raises(InputError, match=r"field gae_lambda is 1\.5"):
        PPOSettings(gae_lambda=1.5)
    with pytest.raises(InputError, match="PPO learns from the field reward alone"):
        ppo(replace(grpo_config(tmp_path), process_reward="a:b"), PPOSettings(), tmp_path / "run")
