"""The gate in Triton: scores, bias, groups, top-k and gate values in one pass over the router's logits (V3 section 2.1.2).

A program holds the logits of a few tokens in registers. The choice is a handful of reductions over E values, so the floor is reading
the logits once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIGMOID, _SOFTMAX = tl.constexpr(0), tl.constexpr(1)
_NONE, _BEST, _BEST_TWO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _without_best(values, axis: tl.constexpr):
    """The largest along an axis (the last), and the values with it (the first of equals) taken out."""
    best = tl.max(values, axis)
    place = tl.argmax(values, axis)
    index = tl.arange(0, values.shape[axis])
    left = tl.where(tl.expand_dims(place, axis) == index, _LOWEST, values)
    return best, place, left


@triton.jit
def route_kernel(
    logits, bias, values_out, indices_out, tokens, scaling,
    experts: tl.constexpr, width: tl.constexpr, top_k: tl.constexpr, width_k: tl.constexpr, groups: tl.constexpr,
    kept_groups: tl.constexpr, scoring: tl.constexpr, group_score: tl.constexpr, has_bias: tl.constexpr, normalise: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """logits float32 [tokens, experts] -> gate values float32 and experts int64 [tokens, top_k], the likeliest expert first."""
    token = tl.program_id(0) * block + tl.arange(0, block)
    expert = tl.arange(0, width)
    mask = (token[:, None] < tokens) & (expert[None, :] < experts)
    x = tl.load(logits + token[:, None].to(tl.int64) * experts + expert[None, :], mask=mask, other=_LOWEST)
    if scoring == _SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        x = tl.where(token[:, None] < tokens, x, 0.0)  # a row of nothing has no largest value
        powers = tl.exp(x - tl.max(x, 1)[:, None])
        scores = powers / tl.sum(powers, 1)[:, None]
    choice = scores
    if has_bias:
        choice = scores + tl.load(bias + expert, mask=expert < experts, other=0.0)[None, :]
    choice = tl.where(expert[None, :] < experts, choice, _LOWEST)
    if group_score != _NONE:
        grouped = tl.reshape(choice, (block, groups, width // groups))
        best, _, left = _without_best(grouped, 2)
        if group_score == _BEST_TWO:
            best += tl.max(left, 2)
        kept = tl.zeros((block, groups), dtype=tl.int32)
        for _ in tl.static_range(kept_groups):
            _, place, best = _without_best(best, 1)
            kept += (place[:, None] == tl.arange(0, groups)[None, :]).to(tl.int32)
        choice = tl.reshape(tl.where(kept[:, :, None] > 0, grouped, _LOWEST), (block, width))
    values = tl.zeros((block, width_k), dtype=tl.float32)
    chosen = tl.zeros((block, width_k), dtype=tl.int32)
    k = tl.arange(0, width_k)
    for step in tl.static_range(top_k):
        _, place, choice = _without_best(choice, 1)
        score = tl.sum(tl.where(place[:, None] == expert[None, :], scores, 0.0), 1)
        values = tl.where(k[None, :] == step, score[:, None], values)
        chosen = tl.where(k[None, :] == step, place[:, None], chosen)
    if normalise:
        values = values / (tl.sum(values, 1) + 1e-20)[:, None]
    place = token[:, None].to(tl.int64) * top_k + k[None, :]
    inside = (token[:, None] < tokens) & (k[None, :] < top_k)
    tl.store(values_out + place, values * scaling, mask=inside)
    tl.store(indices_out + place, chosen.to(tl.int64), mask=inside)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    topk_method: str = "noaux_tc",
    scoring_func: str = "sigmoid",
    normalise: bool = True,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `finback.ops.router.route`, for inference: no gradient passes. Groups must be a power of two of equally many experts, a power
    of two each."""
    tokens, experts = logits.shape
    limited = topk_method != "greedy" and topk_group < n_group
    width = triton.next_power_of_2(experts)
    if limited and (width != experts or triton.next_power_of_2(n_group) != n_group):
        raise ValueError(f"the gate kernel needs powers of two, not {experts} experts in {n_group} groups; use ops.router.route")
    group_score = (_BEST_TWO if topk_method == "noaux_tc" else _BEST) if limited else _NONE
    values = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    block = 8
    if tokens:
        route_kernel[(triton.cdiv(tokens, block),)](
            logits.float().contiguous(), logits if bias is None else bias, values, indices, tokens, scaling, experts, width, top_k,
            triton.next_power_of_2(top_k), n_group if limited else 1, topk_group, _SIGMOID if scoring_func == "sigmoid" else _SOFTMAX,
            group_score, bias is not None, normalise, block,
        )  # fmt: skip
    return values, indices
