"""PPO's advantages and value loss as pure functions (Schulman et al., 2017): the baseline that DeepSeekMath section 4.1 argues against.

The policy's loss is GRPO's clipped surrogate over advantages of tokens (`finback.rl.grpo.global_token_loss`); what differs is where
those come from: a critic, a second model that learns what each state is worth.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_rewards(
    totals: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float = 0.0,
    log_probs: Float[Tensor, "B T"] | None = None,
    reference_log_probs: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """A sample's reward on its last token, and on each -beta log(pi / pi_ref): PPO has the divergence in the reward, GRPO in the loss
    (DeepSeekMath equation 2)."""
    rewards = torch.zeros(mask.shape, dtype=totals.dtype, device=totals.device)
    lengths = mask.sum(-1)
    some = lengths > 0
    rewards[some, lengths[some] - 1] = totals[some]
    if beta:
        assert log_probs is not None, "beta needs log-probabilities"
        assert reference_log_probs is not None, "beta needs the reference's log-probabilities"
        rewards = rewards - beta * (log_probs - reference_log_probs) * mask
    return rewards


def generalised_advantages(
    rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float, gae_lambda: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """(advantages, returns) of tokens, 0 outside of the mask; values are those of the states before the tokens.

    delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lambda A_t+1, return_t = A_t + V_t; behind a sample's last token is
    nothing.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following, value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for token in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, token] + gamma * value - values[:, token]
        following = (delta + gamma * gae_lambda * following) * mask[:, token]
        advantages[:, token], value = following, values[:, token]
    return advantages, (advantages + values) * mask


def whitened(advantages: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Advantages of a whole rollout, however it is cut, with mean 0 and deviation 1 over its tokens."""
    tokens = torch.cat([own[mask] for own, mask in zip(advantages, masks, strict=True)]).double()
    mean, deviation = tokens.mean(), tokens.std(correction=0).clamp(min=1e-8)
    return [((own - mean) / deviation * mask).to(own.dtype) for own, mask in zip(advantages, masks, strict=True)]


def clipped_value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float,
    num_tokens: int | None = None,
) -> Float[Tensor, ""]:
    """Half the mean over tokens of max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2)."""
    held = old_values + (values - old_values).clamp(-epsilon, epsilon)
    worst = torch.maximum((values - returns).square(), (held - returns).square())
    return 0.5 * (worst * mask).sum() / (mask.sum().clamp(min=1) if num_tokens is None else num_tokens)
