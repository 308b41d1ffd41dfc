"""MTP modules in reinforcement learning: trained along on the samples, so that they go on drafting what the policy writes."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from finback.data.packing import Sample
from finback.model.transformer import Transformer
from finback.ops.cross_entropy import linear_cross_entropy
from finback.rl.batch import Batch
from finback.rl.config import GRPOConfig
from finback.rl.rollout import Completion, Rollout
from finback.train.optimizer import clip_scale, gradient_norm
from finback.train.samples import mtp_acceptance, padded_micro_batches

MEASURED = 16  # samples of a step whose drafts are measured


def draft_loss_sum(model: Transformer, batch: Batch, mtp_hidden: Sequence[Tensor]) -> Tensor:
    """Sum over the samples' tokens and the MTP depths of -log p (V3 section 2.2). `mtp_hidden` is cut off from the main model,
    and the head is held fixed, too: the gradient reaches the MTP modules and nothing of the policy."""
    total, head = torch.zeros((), device=batch.ids.device), model.lm_head.weight.detach()
    for hidden, (places, targets) in zip(mtp_hidden, batch.drafts, strict=True):
        total = total + linear_cross_entropy(hidden.index_select(0, places), head, targets)
    return total


def draft_acceptance(model: Transformer, rollout: Rollout, config: GRPOConfig) -> dict[str, float]:
    """`mtp_acceptance` (of the first depth, and `mtp_acceptance_2`, ... of deeper ones): the share of the samples' tokens for which a
    depth's argmax is the main head's, over the first sample of each of a few groups. Empty without MTP modules or tokens."""
    first = [group[0] for group in rollout.groups if group[0].token_ids]
    samples = [sample_of(completion) for completion in islice(first, MEASURED)]
    if not model.mtp_modules or not samples:
        return {}
    rows = padded_micro_batches(samples, config.micro_batch_tokens, pad_token_id=model.config.pad_token_id or 0)
    shares = mtp_acceptance(model, rows, precision=config.precision)
    names = ("mtp_acceptance", *(f"mtp_acceptance_{depth}" for depth in range(2, len(shares) + 1)))
    return {name: share for name, share in zip(names, shares, strict=True) if math.isfinite(share)}


def sample_of(completion: Completion) -> Sample:
    """As fine-tuning takes it: the prompt is read, the tokens that were drawn are learnt."""
    prompt = completion.prompt.token_ids
    return Sample([*prompt, *completion.token_ids], [*[False] * len(prompt), *[True] * len(completion.token_ids)])


def clip_apart(model: Transformer, gradients: Mapping[str, Tensor], max_norm: float) -> float:
    """The norm of the policy's gradients alone. Those of the MTP modules are scaled in place so that clipping by that norm clips them
    by their own: how well drafts are learnt must not move the policy's step. Not finite if either norm is not."""
    first = len(model.blocks)
    drafts = {name: gradient for name, gradient in gradients.items() if _layer(name) >= first}
    norm = gradient_norm({name: gradient for name, gradient in gradients.items() if name not in drafts})
    if not drafts:
        return norm
    own = gradient_norm(drafts)
    if not math.isfinite(own) or not math.isfinite(norm):
        return math.nan
    torch._foreach_mul_(list(drafts.values()), clip_scale(own, max_norm) / clip_scale(norm, max_norm))
    return norm


def _layer(name: str) -> int:
    """Of a parameter's name, -1 outside of the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1
