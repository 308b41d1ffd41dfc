"""Load balancing without an auxiliary loss (V3 section 2.1.2): the router biases, moved once per optimizer step.

Counts are whole numbers summed over every micro-batch of a step, so the update is exactly the same however the batch is cut, and
recomputation in the backward pass cannot count a token twice: the loop takes them from the forward's output.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@torch.no_grad()
def update_expert_bias(biases: Sequence[Float[Tensor, " E"]], counts: Int64[Tensor, "routers E"], speed: float) -> None:
    """b_i += gamma * sign(mean load - load_i) for each router, in place.

    The biases are not recentred, as in the paper: a shift common to all experts of a router changes no choice.
    """
    # mean - load_i and total - E * load_i have the same sign, and the latter is exact
    directions = torch.sign(counts.sum(dim=1, keepdim=True) - counts.shape[1] * counts)
    for bias, direction in zip(biases, directions, strict=True):
        bias.add_(direction.to(bias), alpha=speed)


def max_violation(counts: Int64[Tensor, "routers E"]) -> float:
    """max over routers and experts of (load_i - mean load) / mean load: 0 is perfect balance, E / K - 1 the worst case.

    Routers that saw no token (of an MTP depth beyond the end of every sample) are left out.
    """
    loads = counts[counts.sum(dim=1) > 0].double()
    if loads.numel() == 0:
        return 0.0
    mean = loads.mean(dim=1)
    return float(((loads.amax(dim=1) - mean) / mean).max())
