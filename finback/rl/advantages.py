"""From the scores of a rollout to advantages: of whole samples (outcome supervision), or token by token (process supervision)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from finback.rewards.reward import Step
from finback.rl.grpo import group_advantages, has_spread, process_advantages
from finback.rl.rollout import Completion, Rollout


class Advantages(NamedTuple):
    """What the loss needs."""

    of_samples: Sequence[float | Tensor]  # in the order of the rollout's completions; by token where it is a tensor
    spread: Bool[Tensor, " groups"]  # whether a group teaches anything


def supervise(rollout: Rollout, rewards: Tensor, process_reward: str | None) -> Advantages:
    """By the `rewards` [groups, G] of whole samples, or by the steps of the reward that `process_reward` names."""
    return outcome_supervision(rewards) if process_reward is None else process_supervision(rollout, process_reward)


def outcome_supervision(rewards: Tensor) -> Advantages:
    """Advantages of whole samples from rewards [groups, G] (DeepSeekMath section 4.1.2)."""
    return Advantages(group_advantages(rewards).flatten().tolist(), has_spread(rewards))


def process_supervision(rollout: Rollout, name: str) -> Advantages:
    """Advantages of tokens from the steps that the reward `name` has found in each sample (DeepSeekMath section 4.1.3). What the other
    rewards gave does not count.

    A sample whose steps do not fit its text has none, which is told as a failure of the reward: its tokens have advantage 0.
    """
    of_samples: list[float | Tensor] = []
    spread = []
    for group in rollout.groups:
        steps = [_sound_steps(completion, name) for completion in group]
        ends = [[last_token(completion, end) for end, _ in own] for completion, own in zip(group, steps, strict=True)]
        rewards = [[reward for _, reward in own] for own in steps]
        advantages = process_advantages(rewards, ends, [len(completion.token_ids) for completion in group])
        of_samples += advantages
        spread.append(any(bool(own.any()) for own in advantages))
    return Advantages(of_samples, torch.tensor(spread))


def last_token(completion: Completion, end: int) -> int:
    """The token with which the first `end` characters of a sample's text are complete. The last step takes along what has no text: the
    end token."""
    if end >= len(completion.text):
        return len(completion.token_ids) - 1
    return next(token for token, length in enumerate(completion.text_lengths) if length >= end)


def _sound_steps(completion: Completion, name: str) -> Sequence[Step]:
    assert completion.score is not None, "not scored yet"
    steps = completion.score.steps.get(name, ())
    ends = [end for end, _ in steps]
    if not steps and name in completion.score.components:
        completion.score.failures.setdefault(name, "gave no steps; return a list of (end, reward)")
    if not steps or not completion.token_ids:
        return ()
    if ends[0] < 1 or ends[-1] > len(completion.text) or any(after <= before for before, after in pairwise(ends)):
        completion.score.failures[name] = f"gave steps that end at {ends[:8]}, which must rise from 1 to {len(completion.text)}"
        return ()
    return steps
