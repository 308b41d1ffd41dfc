"""GRPO's advantages and losses as pure functions (DeepSeekMath section 4.1, V3 equations 26-28, R1 equations 1-3).

Notation: a batch holds B samples o_i, padded to T tokens; `mask` is 1 on the tokens of o_i and 0 elsewhere. The two published forms:

    token level      (1/B) sum_i (1/|o_i|) sum_t [ min(rho_it A_it, clip(rho_it) A_it) - beta D_it ]
    sequence level   (1/B) sum_i [ min(rho_i A_i, clip(rho_i) A_i) - beta D_i ],  rho_i the ratio of whole samples

with D = r - log r - 1, r = pi_ref / pi, never negative, and unbiased under samples of pi ("k3"). The negative is
returned: a loss.

Every loss is a sum over its samples divided by `num_samples` (or `num_tokens`), which the caller gives for the whole batch: the
gradients of micro-batches, or of ranks, then add up to that of the batch, however it is cut.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON_STD = 1e-6
"""Rewards of a group whose standard deviation is below this are taken for equal."""


def group_advantages(rewards: Float[Tensor, "*groups G"]) -> Float[Tensor, "*groups G"]:
    """(r_i - mean(r)) / std(r) within each group of samples of one prompt (DeepSeekMath section 4.1.2: outcome supervision).

    The papers publish neither which standard deviation nor what happens where it is 0. Here it is that of the group as it is
    (divided by G), and a group of equal rewards has advantage 0.
    """
    wide = rewards.double()
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    advantages = torch.where(deviation > EPSILON_STD, centred / deviation.clamp(min=EPSILON_STD), 0.0)
    return advantages.to(rewards.dtype)


def has_spread(rewards: Float[Tensor, "*groups G"]) -> Bool[Tensor, "*groups"]:
    """Whether a group's rewards differ: without, it teaches nothing."""
    return rewards.double().std(-1, correction=0) > EPSILON_STD


def process_advantages(
    step_rewards: Sequence[Sequence[float]], step_ends: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[Float[Tensor, " T"]]:
    """Advantages by token from rewards of steps (DeepSeekMath section 4.1.3: process supervision), for the samples of one group.

    Sample i has the rewards `step_rewards[i]`, of steps whose last tokens are `step_ends[i]` (indices, rising), and `lengths[i]`
    tokens. Rewards are normalised over all steps of all samples of the group; a token's advantage is the sum of the
    normalised rewards of the steps that end at it or after it.
    """
    flat = torch.tensor([reward for rewards in step_rewards for reward in rewards], dtype=torch.float64)
    normalised = group_advantages(flat).tolist() if flat.numel() else []
    advantages, first = [], 0
    for rewards, ends, length in zip(step_rewards, step_ends, lengths, strict=True):
        at_ends = torch.zeros(length, dtype=torch.float64)
        for reward, end in zip(normalised[first : first + len(rewards)], ends, strict=True):
            at_ends[end] += reward
        first += len(rewards)
        advantages.append(at_ends.flip(0).cumsum(0).flip(0).float())
    return advantages


def k3_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """r - log r - 1 with r = pi_ref / pi, elementwise: an estimate of KL(pi || pi_ref) that is never negative."""
    log_ratio = reference_log_probs - log_probs
    return torch.expm1(log_ratio) - log_ratio


def surrogate(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None = None) -> Tensor:
    """min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), elementwise; `epsilon_high` is `epsilon` if not given."""
    high = epsilon if epsilon_high is None else epsilon_high
    return torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None = None) -> Tensor:
    """Where the clip holds the ratio, elementwise: there the policy term has no gradient."""
    high = epsilon if epsilon_high is None else epsilon_high
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - epsilon) & (advantages < 0))


def token_level_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"] | Float[Tensor, "B T"],
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reference_log_probs: Float[Tensor, "B T"] | None = None,
    num_samples: int | None = None,
) -> Float[Tensor, ""]:
    """The token-level form (DeepSeekMath equation 3): the mean over a sample's tokens, then over samples.

    `log_probs` has the gradient. `num_samples` is the number of samples of the whole batch; B if not given. A sample without
    tokens adds 0.
    """
    mask = mask.to(log_probs.dtype)
    objective = _token_objective(log_probs, old_log_probs, advantages, mask, epsilon, epsilon_high, beta, reference_log_probs)
    per_sample = objective.sum(-1) / mask.sum(-1).clamp(min=1)
    return -per_sample.sum() / (len(log_probs) if num_samples is None else num_samples)


def global_token_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"] | Float[Tensor, "B T"],
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reference_log_probs: Float[Tensor, "B T"] | None = None,
    num_tokens: int | None = None,
) -> Float[Tensor, ""]:
    """The mean over all tokens of the batch, long samples weighing more: not DeepSeek's, but what many trainers use.

    `num_tokens` is the number of the batch's tokens; the mask's sum if not given.
    """
    mask = mask.to(log_probs.dtype)
    objective = _token_objective(log_probs, old_log_probs, advantages, mask, epsilon, epsilon_high, beta, reference_log_probs)
    return -objective.sum() / (mask.sum().clamp(min=1) if num_tokens is None else num_tokens)


def sequence_level_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reference_log_probs: Float[Tensor, "B T"] | None = None,
    num_samples: int | None = None,
) -> Float[Tensor, ""]:
    """The sequence-level form (V3 equations 26-28, R1 equations 1-3): ratio and divergence of whole samples, no division by length."""
    mask = mask.to(log_probs.dtype)
    current = (log_probs * mask).sum(-1)
    ratio = torch.exp(current - (old_log_probs * mask).sum(-1))
    objective = surrogate(ratio, advantages, epsilon, epsilon_high)
    if beta:
        assert reference_log_probs is not None, "beta needs the reference's log-probabilities"
        objective = objective - beta * k3_divergence(current, (reference_log_probs * mask).sum(-1))
    return -objective.sum() / (len(log_probs) if num_samples is None else num_samples)


def _token_objective(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float,
    epsilon_high: float | None,
    beta: float,
    reference_log_probs: Tensor | None,
) -> Tensor:
    """What each token adds, [B, T]; 0 outside of the mask."""
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    ratio = torch.exp((log_probs - old_log_probs) * mask)  # 1 outside: what stands there may be anything finite
    objective = surrogate(ratio, advantages, epsilon, epsilon_high)
    if beta:
        assert reference_log_probs is not None, "beta needs the reference's log-probabilities"
        objective = objective - beta * k3_divergence(log_probs * mask, reference_log_probs * mask)
    return objective * mask
