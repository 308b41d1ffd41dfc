"""Expert selection (V3 section 2.1.2, V2 section 2.2): scores, node-limited top-k, gate values, balance terms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.build import training_kernels_for
from finback.ops.precision import wide


def router_scores(x: Tensor, weight: Tensor, scoring_func: str) -> Tensor:
    """Affinities s = sigmoid(W x) or softmax(W x), in float32 whatever the dtypes: x [N, D], weight [E, D] -> [N, E]."""
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(wide(x.dtype)), weight.to(wide(x.dtype)))
    return logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)


def select_experts(
    scores: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    topk_method: str = "noaux_tc",
) -> Tensor:
    """Indices int64 [N, K] of the experts that each token goes to; scores [N, E], bias [E] or None.

    `noaux_tc` (V3) selects on s + b, and keeps the `topk_group` groups with the largest sum of their two best biased scores;
    `group_limited_greedy` (V2) keeps the groups with the largest score; `greedy` looks at no groups. Experts of dropped groups are
    masked with -inf, not with 0: a biased score may be negative. Of equal scores any may be taken.
    """
    choice = scores if bias is None else scores + bias
    limited = topk_method != "greedy" and topk_group < n_group
    kernels = training_kernels_for(choice) if choice.dtype == torch.float32 else None
    if kernels is None:
        return _select_in_torch(choice, top_k, n_group if limited else 1, topk_group, topk_method)
    return kernels.select_experts(choice, top_k, *((n_group, topk_group) if limited else (1, 1)), topk_method == "noaux_tc")


def _select_in_torch(choice: Tensor, top_k: int, n_group: int, topk_group: int, topk_method: str) -> Tensor:
    """The same over biased scores: the C kernel's twin."""
    if n_group > 1:
        grouped = choice.view(choice.shape[0], n_group, -1)
        per_group = grouped.topk(2, dim=-1).values.sum(-1) if topk_method == "noaux_tc" else grouped.amax(-1)
        kept = per_group.topk(topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(per_group, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    return choice.topk(top_k, dim=-1, sorted=False).indices


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
    """The whole gate from the router's logits float32 [N, E]: gate values float32 and experts int64, both [N, K]."""
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    indices = select_experts(scores, bias, top_k, n_group, topk_group, topk_method)
    return gate_values(scores, indices, normalise, scaling), indices


def gate_values(scores: Tensor, indices: Tensor, normalise: bool, scaling: float) -> Tensor:
    """What each chosen expert's output is multiplied by: the unbiased scores, renormalised over the chosen, scaled: float32 [N, K]."""
    values = scores.gather(1, indices)
    if normalise:
        values = values / (values.sum(-1, keepdim=True) + 1e-20)
    return values * scaling


def sequence_balance(scores: Tensor, sequences: int, top_k: int) -> Tensor:
    """Mean over sequences of sum_i f_i P_i (V3 equations 17-20, without alpha): scores [sequences * T, E] -> scalar.

    f_i = E / (K T) times how often i is in the top K of the *unbiased* scores; P_i = mean over the sequence of s_i / sum_j s_j.
    """
    n_experts = scores.shape[-1]
    per_sequence = scores.view(sequences, -1, n_experts)
    tokens = per_sequence.shape[1]
    with torch.no_grad():
        chosen = select_experts(scores, None, top_k).view(sequences, -1)
        hits = torch.zeros(sequences, n_experts, dtype=scores.dtype, device=scores.device)
        hits.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
        frequency = hits * (n_experts / (top_k * tokens))
    share = (per_sequence / per_sequence.sum(-1, keepdim=True)).mean(1)
    return (frequency * share).sum(-1).mean()


def document_balance(scores: Tensor, documents: Tensor, num_documents: int, top_k: int) -> Tensor:
    """Sum over documents of sum_i f_i P_i, each as in `sequence_balance`: scores [N, E], documents int64 [N] -> scalar.

    `documents` says whose token each row is, from 0 to `num_documents` - 1; negative rows are nobody's. A document without rows adds 0.
    """
    n_experts = scores.shape[-1]
    index = documents.where(documents >= 0, num_documents)  # one more, for what is nobody's
    tokens = torch.bincount(index, minlength=num_documents + 1).clamp(min=1).unsqueeze(1)
    table = scores.new_zeros(num_documents + 1, n_experts)
    with torch.no_grad():
        chosen = select_experts(scores, None, top_k)
        hits = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
        frequency = table.index_add(0, index, hits) * (n_experts / top_k) / tokens
    share = table.index_add(0, index, scores / scores.sum(-1, keepdim=True)) / tokens
    return (frequency * share)[:num_documents].sum()
