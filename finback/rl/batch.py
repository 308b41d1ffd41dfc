"""Completions as padded rows, and their log-probabilities under a model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finback.model.transformer import Transformer
from finback.ops.cross_entropy import linear_log_probs
from finback.rl.rollout import Completion


class Batch:
    """B samples, one to a row: `ids` and `valid` [B, W] hold prompts and samples, padded at the end; `mask` and log-probabilities are
    [B, T] and begin with the samples' first tokens."""

    def __init__(
        self, completions: Sequence[Completion], advantages: Sequence[float | Tensor], pad_token_id: int, device: torch.device
    ) -> None:
        width = max(_length(completion) for completion in completions)
        longest = max(1, *(len(completion.token_ids) for completion in completions))
        ids = np.full((len(completions), width), pad_token_id, dtype=np.int64)
        valid, predicts = np.zeros_like(ids, dtype=np.bool_), np.zeros_like(ids, dtype=np.bool_)
        mask = np.zeros((len(completions), longest), dtype=np.bool_)
        engine = np.zeros((len(completions), longest), dtype=np.float32)
        for row, completion in enumerate(completions):
            prompt, sample = completion.prompt.token_ids, completion.token_ids
            end = len(prompt) + len(sample)
            ids[row, :end] = [*prompt, *sample]
            valid[row, :end] = True
            predicts[row, len(prompt) - 1 : end - 1] = True  # the token that follows is a sample's
            mask[row, : len(sample)] = True
            engine[row, : len(sample)] = completion.log_probs
        self.completions = completions
        self.ids, self.valid, self.predicts, self.mask, self.engine_log_probs = (
            torch.from_numpy(array).to(device) for array in (ids, valid, predicts, mask, engine)
        )
        self.experts = _experts(completions, width, device)
        self.advantages = _padded_advantages(advantages, longest).to(device)
        """[B], or [B, T] where they differ from token to token."""
        self.old_log_probs: Tensor | None = None
        """Under the policy that wrote the samples, by the trainer."""
        self.reference_log_probs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass computes, padding included."""
        return self.ids.numel()


def cut_batches(
    completions: Sequence[Completion],
    advantages: Sequence[float | Tensor],
    micro_batch_tokens: int,
    pad_token_id: int,
    device: torch.device,
) -> list[Batch]:
    """The samples in batches of at most `micro_batch_tokens` tokens (or one sample), like lengths together: little is padding."""
    order = sorted(range(len(completions)), key=lambda i: -_length(completions[i]))
    batches, members = list[Batch](), list[int]()
    for i in [*order, None]:
        full = i is None or (members and (len(members) + 1) * _length(completions[members[0]]) > micro_batch_tokens)
        if full and members:
            chosen = [completions[m] for m in members]
            batches.append(Batch(chosen, [advantages[m] for m in members], pad_token_id, device))
            members = []
        if i is not None:
            members.append(i)
    return batches


def _length(completion: Completion) -> int:
    return len(completion.prompt.token_ids) + len(completion.token_ids)


def _padded_advantages(advantages: Sequence[float | Tensor], longest: int) -> Tensor:
    rows = [own for own in advantages if isinstance(own, Tensor)]
    if not rows:
        return torch.tensor(advantages, dtype=torch.float32)
    padded = torch.zeros(len(rows), longest)
    for row, own in enumerate(rows):
        padded[row, : len(own)] = own
    return padded


def _experts(completions: Sequence[Completion], width: int, device: torch.device) -> Tensor | None:
    """The engine's choices int64 [layers, B, W, K], -1 where it made none (padding, and the last token of each sample); None where
    they are not recorded."""
    recorded = [completion.experts for completion in completions]
    if recorded[0] is None:
        return None
    _, layers, top_k = recorded[0].shape
    chosen = torch.full((layers, len(completions), width, top_k), -1, dtype=torch.int64)
    for row, experts in enumerate(recorded):
        assert experts is not None, "the engine records the choices of all samples or of none"
        chosen[:, row, : len(experts)] = experts.transpose(0, 1)
    return chosen.to(device)


class BatchLogProbs(NamedTuple):
    """What a forward pass says of a batch's samples; log-probabilities [B, T] are 0 outside of the mask."""

    at_temperature: Tensor
    at_one: Tensor  # without a gradient, unless the temperature is 1
    expert_counts: Tensor  # int64 [routers, E]
    mtp_hidden: list[Tensor]  # as in TrainOutput


def sample_log_probs(
    model: Transformer, batch: Batch, *, temperature: float, precision: str, mtp: bool = False, replay: bool = True
) -> BatchLogProbs:
    """The samples' tokens under a model. With `mtp` the MTP modules are computed, too, cut off from the rest (`detach_mtp`). With
    `replay` the routers take the experts that the engine recorded, if it did."""
    chosen = batch.experts if replay else None
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = model.train_forward(batch.ids, valid=batch.valid, mtp=mtp, detach_mtp=True, chosen=chosen)
    hidden = output.hidden[batch.predicts]
    targets = batch.ids[:, 1:][batch.predicts[:, :-1]]
    empty = torch.zeros_like(batch.engine_log_probs)
    at_temperature = empty.masked_scatter(batch.mask, linear_log_probs(hidden / temperature, model.lm_head.weight, targets))
    at_one = at_temperature.detach()
    if temperature != 1:
        with torch.no_grad():
            at_one = empty.masked_scatter(batch.mask, linear_log_probs(hidden, model.lm_head.weight, targets))
    return BatchLogProbs(at_temperature, at_one, output.expert_counts, output.mtp_hidden)
