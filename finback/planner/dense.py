"""Dense or mixture of experts at equal loss, by two named laws.

Chinchilla's parametric loss (Hoffmann et al. 2022, approach 3): L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28, for N parameters and D
tokens. A mixture counts as a dense model of sqrt(total x active) parameters, a rule of thumb that is passed on without a paper to
cite. What speaks for it is one published pair: it gives 6.8B for DeepSeekMoE-16B, which the DeepSeekMoE paper (section 5) finds on a
par with a dense 7B on the same 2T tokens, at 40% of the compute.
Both are rough; the rule is unproven at V3's size.
"""

import math
from dataclasses import dataclass

from finback.config import ModelConfig, count_params
from finback.planner.model import attention_core_flops, training_flops_per_token

IRREDUCIBLE, PARAMETER_SCALE, TOKEN_SCALE, PARAMETER_POWER, TOKEN_POWER = 1.69, 406.4, 410.7, 0.34, 0.28
LAW = "Hoffmann et al. 2022, approach 3; a mixture counts as sqrt(total x active) parameters, a rule of thumb without a source"


def chinchilla_loss(parameters: float, tokens: float) -> float:
    """Nats per token."""
    return float(IRREDUCIBLE + PARAMETER_SCALE / parameters**PARAMETER_POWER + TOKEN_SCALE / tokens**TOKEN_POWER)


def dense_equivalent(c: ModelConfig) -> float:
    """Parameters of the dense model of the same loss on the same tokens."""
    counts = count_params(c)
    return math.sqrt(counts.total * counts.active)


@dataclass(frozen=True)
class DenseComparison:
    """The dense model of equal loss on the same tokens, and the cheapest dense model of equal loss on its own number of tokens."""

    law: str
    equivalent_dense_parameters: float
    predicted_loss_nats: float
    moe_training_flops: float
    dense_training_flops: float
    dense_over_moe_training: float
    cheapest_dense_parameters: float
    cheapest_dense_tokens: float
    cheapest_dense_over_moe_training: float
    dense_over_moe_decode_flops: float


def compare_with_dense(c: ModelConfig, tokens: float, sequence_length: int) -> DenseComparison:
    """Training FLOPs of both at equal loss; the dense model's attention costs what the mixture's does."""
    equal = dense_equivalent(c)
    loss = chinchilla_loss(equal, tokens)
    scores = 3.0 * c.num_hidden_layers * attention_core_flops(c, (sequence_length + 1) / 2)
    mixture = training_flops_per_token(c, sequence_length, mtp=False)
    dense = 6.0 * equal + scores
    size, data = cheapest(loss, scores)
    active = count_params(c).active - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    return DenseComparison(
        law=LAW,
        equivalent_dense_parameters=equal,
        predicted_loss_nats=loss,
        moe_training_flops=mixture * tokens,
        dense_training_flops=dense * tokens,
        dense_over_moe_training=dense / mixture,
        cheapest_dense_parameters=size,
        cheapest_dense_tokens=data,
        cheapest_dense_over_moe_training=(6.0 * size + scores) * data / (mixture * tokens),
        dense_over_moe_decode_flops=equal / active,
    )


def cheapest(loss: float, attention_flops: float) -> tuple[float, float]:
    """Parameters and tokens that reach `loss` at the least compute, by a scan over sizes in steps of 2%."""
    best = (float("inf"), 0.0, 0.0)
    size = 1e6
    while size < 1e14:
        left = loss - IRREDUCIBLE - PARAMETER_SCALE / size**PARAMETER_POWER
        if left > 0:
            data = (TOKEN_SCALE / left) ** (1 / TOKEN_POWER)
            best = min(best, ((6.0 * size + attention_flops) * data, size, data))
        size *= 1.02
    return best[1], best[2]
