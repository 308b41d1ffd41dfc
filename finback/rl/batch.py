"""Completions as batches whose samples share their prompts, and their log-probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finback.model.transformer import Transformer
from finback.ops.cross_entropy import linear_log_probs
from finback.ops.shared_prefix import SharedPrefixes
from finback.rl.rollout import Completion

PADDED = 4  # times `micro_batch_tokens`: tokens of all sequences of a batch, padded to the longest of them


class Batch:
    """B samples as one row of N tokens, in which a prompt stands once for all its samples that are neighbours; the last token of a
    sample, which nothing follows, is not in it. `mask` and log-probabilities are [B, T] and begin with the samples' first tokens.

    `depths` is the number of the model's MTP modules. The last 1 + `depths` tokens of a prompt stand before each sample instead: what
    is predicted from them is the sample's, or is read together with it, and so no place in the row predicts for two.
    """

    def __init__(
        self, completions: Sequence[Completion], advantages: Sequence[float | Tensor], depths: int, device: torch.device
    ) -> None:
        assert all(c.prompt.token_ids and c.token_ids for c in completions), "a prompt or a sample has no tokens: leave it out"
        groups = _groups(completions, depths)
        sequences = [[*c.prompt.token_ids, *c.token_ids] for c in completions]
        places = _places(groups)  # of each sample's tokens in the row, but for its last one
        total = sum(prefix + sum(own) for prefix, own in groups)
        ids, following = np.zeros(total, dtype=np.int64), np.zeros((depths, total), dtype=np.int64)
        times = np.zeros((1 + depths, total), dtype=np.int64)
        longest = max(1, *(len(completion.token_ids) for completion in completions))
        mask = np.zeros((len(completions), longest), dtype=np.bool_)
        engine = np.zeros((len(completions), longest), dtype=np.float32)
        drafts: list[list[tuple[NDArray[np.int64], list[int]]]] = [[] for _ in range(depths)]
        for row, (completion, sequence, place) in enumerate(zip(completions, sequences, places, strict=True)):
            ids[place] = sequence[:-1]
            times[0, place] += 1
            for depth in range(depths):
                ahead = sequence[depth + 1 :]
                following[depth, place[: len(ahead)]] = ahead
                times[1 + depth, place[: len(ahead)]] += 1
                first = max(0, len(completion.prompt.token_ids) - depth - 2)  # which drafts the sample's first token, if one does
                learnt = sequence[first + depth + 2 :]
                drafts[depth].append((place[first : first + len(learnt)], learnt))
            mask[row, : len(completion.token_ids)] = True
            engine[row, : len(completion.token_ids)] = completion.log_probs
        predicting = [place[len(c.prompt.token_ids) - 1 :] for c, place in zip(completions, places, strict=True)]
        targets = [token for completion in completions for token in completion.token_ids]
        self.completions = completions
        self.prefixes = SharedPrefixes(groups, device)
        self.ids, self.following, self.times, self.mask, self.engine_log_probs, self.predicts, self.targets = (
            torch.from_numpy(array).to(device)
            for array in (ids, following, times, mask, engine, np.concatenate(predicting), np.array(targets, dtype=np.int64))
        )
        """`predicts`: the places in the row from which the samples' tokens, `targets`, are predicted, sample after sample. `times`: how
        many samples have a token, and for how many each depth reads it, as `samples_forward` takes them with `following`."""
        self.drafts = [
            (
                torch.from_numpy(np.concatenate([place for place, _ in of_depth])).to(device),
                torch.tensor([token for _, learnt in of_depth for token in learnt], dtype=torch.int64, device=device),
            )
            for of_depth in drafts
        ]
        """Of each depth the places from which it drafts tokens of the samples, and these tokens."""
        self.experts = _experts(completions, places, total, device)
        self.advantages = _padded_advantages(advantages, longest).to(device)
        """[B], or [B, T] where they differ from token to token."""
        self.old_log_probs: Tensor | None = None
        """Under the policy that wrote the samples, by the trainer."""
        self.reference_log_probs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass computes."""
        return self.ids.numel()


def cut_batches(
    completions: Sequence[Completion],
    advantages: Sequence[float | Tensor],
    micro_batch_tokens: int,
    depths: int,
    device: torch.device,
) -> list[Batch]:
    """The samples in batches of at most `micro_batch_tokens` tokens (or one sample). Those of a prompt stand together, and like
    lengths, since attention pads its sequences to the longest: to `PADDED` times as many tokens at most."""
    lengths = [sum(_lengths(completion, depths)) for completion in completions]
    longest: dict[tuple[int, ...], int] = {}  # of each prompt
    for completion, length in zip(completions, lengths, strict=True):
        prompt = tuple(completion.prompt.token_ids)
        longest[prompt] = max(length, longest.get(prompt, 0))
    places = {prompt: place for place, prompt in enumerate(sorted(longest, key=lambda prompt: -longest[prompt]))}
    prompts = [places[tuple(completion.prompt.token_ids)] for completion in completions]
    parts, tokens, sequences, width = list[list[int]](), 0, 0, 0
    for i in sorted(range(len(completions)), key=lambda i: (prompts[i], -lengths[i])):
        prefix, own = _lengths(completions[i], depths)
        joins = bool(parts) and prompts[parts[-1][-1]] == prompts[i]  # its prompt is there
        tokens, sequences, width = tokens + own + (not joins) * prefix, sequences + 2 - joins, max(width, lengths[i])
        if not parts or tokens > micro_batch_tokens or sequences * width > PADDED * micro_batch_tokens:
            parts.append([])
            tokens, sequences, width = prefix + own, 2, lengths[i]
        parts[-1].append(i)
    return [Batch([completions[i] for i in part], [advantages[i] for i in part], depths, device) for part in parts]


def _lengths(completion: Completion, depths: int) -> tuple[int, int]:
    """Tokens of a sample that its prompt's other samples have, too, and those of its own, but for the last one."""
    shared = max(0, len(completion.prompt.token_ids) - 1 - depths)
    return shared, len(completion.prompt.token_ids) + len(completion.token_ids) - 1 - shared


def _groups(completions: Sequence[Completion], depths: int) -> list[tuple[int, list[int]]]:
    """What SharedPrefixes is made from; samples of a prompt are neighbours."""
    groups: list[tuple[int, list[int]]] = []
    last: list[int] | None = None
    for completion in completions:
        prefix, own = _lengths(completion, depths)
        if last != completion.prompt.token_ids:
            groups.append((prefix, []))
        groups[-1][1].append(own)
        last = completion.prompt.token_ids
    return groups


def _places(groups: Sequence[tuple[int, Sequence[int]]]) -> list[NDArray[np.int64]]:
    """For each sample the places of its tokens in the row."""
    places, at = list[NDArray[np.int64]](), 0
    for prefix, lengths in groups:
        shared, at = np.arange(at, at + prefix), at + prefix
        for length in lengths:
            places.append(np.concatenate([shared, np.arange(at, at + length)]))
            at += length
    return places


def _padded_advantages(advantages: Sequence[float | Tensor], longest: int) -> Tensor:
    rows = [own for own in advantages if isinstance(own, Tensor)]
    if not rows:
        return torch.tensor(advantages, dtype=torch.float32)
    padded = torch.zeros(len(rows), longest)
    for row, own in enumerate(rows):
        padded[row, : len(own)] = own
    return padded


def _experts(
    completions: Sequence[Completion], places: Sequence[NDArray[np.int64]], total: int, device: torch.device
) -> Tensor | None:
    """The engine's choices int64 [layers, N, K], of a prompt those for its first sample here; None where they are not recorded."""
    if completions[0].experts is None:
        return None
    _, layers, top_k = completions[0].experts.shape
    chosen = torch.full((layers, total, top_k), -1, dtype=torch.int64)
    for completion, place in reversed(list(zip(completions, places, strict=True))):
        assert completion.experts is not None, "the engine records the choices of all samples or of none"
        chosen[:, place] = completion.experts.transpose(0, 1).long()
    return chosen.to(device)


class BatchLogProbs(NamedTuple):
    """What a forward pass says of a batch's samples; log-probabilities [B, T] are 0 outside of the mask."""

    at_temperature: Tensor
    at_one: Tensor  # without a gradient, unless the temperature is 1
    expert_counts: Tensor  # int64 [routers, E]
    mtp_hidden: list[Tensor]  # as in SamplesOutput


def sample_log_probs(
    model: Transformer, batch: Batch, *, temperature: float, precision: str, mtp: bool = False, replay: bool = True
) -> BatchLogProbs:
    """The samples' tokens under a model. With `mtp` the MTP modules are computed, too, cut off from the rest. With `replay` the
    routers take the experts that the engine recorded, if it did."""
    chosen = batch.experts if replay else None
    following = batch.following if mtp else batch.following[:0]
    with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = model.samples_forward(batch.ids, batch.prefixes, batch.times, following, chosen=chosen)
    hidden = output.hidden.index_select(0, batch.predicts)
    empty = torch.zeros_like(batch.engine_log_probs)
    at_temperature = empty.masked_scatter(batch.mask, linear_log_probs(hidden / temperature, model.lm_head.weight, batch.targets))
    at_one = at_temperature.detach()
    if temperature != 1:
        with torch.no_grad():
            at_one = empty.masked_scatter(batch.mask, linear_log_probs(hidden, model.lm_head.weight, batch.targets))
    return BatchLogProbs(at_temperature, at_one, output.expert_counts, output.mtp_hidden)
