"""Fine-tuning samples as batches, their loss on completions, and how well the MTP modules draft them."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from finback.config import InputError
from finback.data.packing import PackedSamples, Sample, pack_samples, pad_samples
from finback.data.stream import permute
from finback.model.transformer import TrainOutput, Transformer
from finback.ops.cross_entropy import linear_cross_entropy
from finback.ops.products import mm
from finback.train.config import Precision, Recompute
from finback.train.losses import BatchLosses, LossSums
from finback.train.sft_config import Batching

Item = TypeVar("Item")
_LOGITS_AT_ONCE = 1 << 22


class SampleStream(Generic[Item]):
    """Every item once per epoch, in an order that `seed` and the epoch give; a batch never reaches into the next epoch.

    `fingerprint` tells the items from others when a run is resumed.
    """

    def __init__(self, items: Sequence[Item], *, seed: int, fingerprint: str) -> None:
        self.items = items
        self.seed = seed
        self.taken = 0
        self._fingerprint = fingerprint

    def next_batch(self, size: int) -> list[Item]:
        """Up to `size` items."""
        epoch, start = divmod(self.taken, len(self.items))
        end = min(start + size, len(self.items))
        self.taken += end - start
        return [self.items[permute(place, len(self.items), key=(self.seed, epoch))] for place in range(start, end)]

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {"taken": self.taken, "seed": self.seed, "samples": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; InputError if it belongs to other items."""
        for name, own in (("seed", self.seed), ("samples", self._fingerprint)):
            if state.get(name) != own:
                raise InputError(
                    f"the run was started with other samples ({name} differs); resume it with the data it started with"
                )
        self.taken = int(state["taken"])


class SampleRows(NamedTuple):
    """A micro-batch: rows of T + 1 tokens, so that T inputs have T targets."""

    ids: Int64[Tensor, "B T_plus_1"]
    sample_ids: Int64[Tensor, "B T_plus_1"]
    """Which sample a token belongs to; -1: padding."""
    loss_mask: Bool[Tensor, "B T_plus_1"]
    """True where a token is learnt."""
    packed: bool
    """Rows may hold several samples, which must not see each other."""

    def forward(self, model: Transformer, *, recompute: Recompute = "none", mtp: bool = True) -> TrainOutput:
        """`train_forward` over the inputs. A sample's last token predicts nothing: it counts no more than padding does."""
        here = self.sample_ids[:, :-1]
        predicts = (here == self.sample_ids[:, 1:]) & (here >= 0)
        return model.train_forward(
            self.ids[:, :-1],
            document_ids=here.where(predicts, -1) if self.packed else None,
            valid=None if self.packed else predicts,
            recompute=recompute,
            mtp=mtp,
        )

    def learnt(self, ahead: int) -> Bool[Tensor, "B T_here"]:
        """Positions from which a token of the completion stands `ahead` further on in the same sample: [B, T + 1 - ahead]."""
        return self.loss_mask[:, ahead:] & (self.sample_ids[:, ahead:] == self.sample_ids[:, :-ahead])

    @property
    def num_samples(self) -> int:
        return int(self.sample_ids[self.sample_ids >= 0].unique().numel())

    def to(self, device: torch.device) -> "SampleRows":
        return SampleRows(self.ids.to(device), self.sample_ids.to(device), self.loss_mask.to(device), self.packed)


def micro_batches(
    samples: Sequence[Sample], *, sequence_length: int, micro_batch_size: int, batching: Batching, pad_token_id: int = 0
) -> list[SampleRows]:
    """A batch cut into micro-batches of at most about `micro_batch_size` x `sequence_length` tokens."""
    if batching == "pad":
        return padded_micro_batches(samples, micro_batch_size * sequence_length, pad_token_id=pad_token_id)
    return packed_micro_batches(samples, sequence_length, micro_batch_size, pad_token_id=pad_token_id)


def packed_micro_batches(
    samples: Sequence[Sample], sequence_length: int, rows: int, *, pad_token_id: int = 0
) -> list[SampleRows]:
    """Best-fit packing into rows of `sequence_length`, so many rows at a time, columns that are padding in all of them left out."""
    packed = pack_samples(samples, sequence_length, pad_token_id=pad_token_id)
    return [_rows(packed, slice(start, start + rows), True) for start in range(0, len(packed.input_ids), rows)]


def padded_micro_batches(samples: Sequence[Sample], tokens: int, *, pad_token_id: int = 0) -> list[SampleRows]:
    """One sample to a row, longest first, as many as keep rows x longest within `tokens` (at least one)."""
    ordered = sorted(samples, key=lambda sample: -len(sample.ids))
    parts, start = [], 0
    while start < len(ordered):
        count = max(1, tokens // len(ordered[start].ids))
        parts.append(_rows(pad_samples(ordered[start : start + count], pad_token_id), slice(None), False))
        start += count
    return parts


def _rows(samples: PackedSamples, which: slice, packed: bool) -> SampleRows:
    sample_ids = samples.sample_ids[which]
    width = int(np.flatnonzero((sample_ids >= 0).any(axis=0))[-1]) + 1
    ids, mask = samples.input_ids[which, :width], samples.loss_mask[which, :width]
    ids, sample_ids, mask = (np.ascontiguousarray(array) for array in (ids, sample_ids[:, :width], mask))
    return SampleRows(torch.from_numpy(ids), torch.from_numpy(sample_ids), torch.from_numpy(mask), packed)


def sample_loss_sums(output: TrainOutput, head: Float[Tensor, "vocab D"], rows: SampleRows) -> LossSums:
    """Sums of -log p over completion tokens. Position i of the main head predicts token i + 1, of MTP depth k (from 0) token i + 2 + k
    (V3 section 2.2), of its own sample only. The head is multiplied where there is something to predict."""
    return LossSums(_selected_loss(output.hidden, head, rows, 1), mtp_loss_sum(output.mtp_hidden, head, rows))


def mtp_loss_sum(mtp_hidden: Sequence[Tensor], head: Float[Tensor, "vocab D"], rows: SampleRows) -> Tensor:
    """The MTP part of `sample_loss_sums`, of all depths together."""
    total = torch.zeros((), device=head.device)
    for depth, hidden in enumerate(mtp_hidden):
        total = total + _selected_loss(hidden, head, rows, 2 + depth)
    return total


def _selected_loss(hidden: Tensor, head: Tensor, rows: SampleRows, ahead: int) -> Tensor:
    learnt = rows.learnt(ahead).flatten().nonzero().squeeze(1)
    targets = rows.ids[:, ahead:].flatten().index_select(0, learnt)
    return linear_cross_entropy(hidden.flatten(0, 1).index_select(0, learnt), head, targets)


def accumulate_sample_gradients(
    model: Transformer,
    batch: Sequence[SampleRows],
    *,
    mtp_loss_coef: float,
    balance_loss_coef: float,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    mtp: bool = True,
) -> BatchLosses:
    """Add the gradient of loss + lambda mtp_loss + alpha balance_loss to the parameters' `.grad`.

    The losses are divided by the completion tokens of all micro-batches together, the balance loss by their samples: it is the mean
    over samples whatever the packing and the cut. Without `mtp` the MTP modules are not computed and have no row in the counts.
    """
    samples = sum(rows.num_samples for rows in batch)
    tokens = sum(int(rows.learnt(1).sum()) for rows in batch)
    depths = max(1, model.config.num_nextn_predict_layers)
    device = model.lm_head.weight.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    counts: Tensor | None = None
    for rows in batch:
        share = rows.num_samples / samples
        rows = rows.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = rows.forward(model, recompute=recompute, mtp=mtp)
            main, mtp_sum = sample_loss_sums(output, model.lm_head.weight, rows)
        balance = output.balance_loss * share
        objective = (main + mtp_loss_coef / depths * mtp_sum) / tokens + balance_loss_coef * balance
        objective.backward()
        parts = [main.detach().double() / tokens, mtp_sum.detach().double() / (tokens * depths), balance.detach().double()]
        sums += torch.stack(parts)
        counts = output.expert_counts if counts is None else counts + output.expert_counts
    assert counts is not None
    loss, mtp_loss, balance_loss = sums.tolist()  # the one wait for the device
    return BatchLosses(loss, mtp_loss, balance_loss, counts)


@torch.no_grad()
def completion_loss(model: Transformer, batch: Sequence[SampleRows], *, precision: Precision = "fp32") -> float:
    """Mean -log p of the main head over the completion tokens of a batch, nats per token."""
    device = model.lm_head.weight.device
    total, tokens = 0.0, 0
    for rows in batch:
        rows = rows.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = rows.forward(model, mtp=False)
            total += float(_selected_loss(output.hidden, model.lm_head.weight, rows, 1))
        tokens += int(rows.learnt(1).sum())
    return total / tokens


@torch.no_grad()
def mtp_acceptance(model: Transformer, batch: Sequence[SampleRows], *, precision: Precision = "fp32") -> list[float]:
    """For each MTP depth, the share of completion tokens for which its argmax is the main head's: what greedy speculative decoding
    would accept of its drafts, if the model wrote these completions. NaN where no token stands far enough in its sample."""
    device = model.lm_head.weight.device
    head = model.lm_head.weight
    agreed = torch.zeros(model.config.num_nextn_predict_layers, 2, dtype=torch.int64)
    for rows in batch:
        rows = rows.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = rows.forward(model)
            main = _argmax(output.hidden, head)
            for depth, hidden in enumerate(output.mtp_hidden):
                if not hidden.shape[1]:
                    continue
                # Position i of this depth and position i + 1 + depth of the main head predict the same token.
                learnt = rows.learnt(2 + depth)
                same = (_argmax(hidden, head) == main[:, depth + 1 :]) & learnt
                agreed[depth] += torch.stack([same.sum(), learnt.sum()]).cpu()
    return [same / total if total else float("nan") for same, total in agreed.tolist()]


def _argmax(hidden: Float[Tensor, "B T D"], head: Float[Tensor, "vocab D"]) -> Int64[Tensor, "B T"]:
    """The most probable token of each position; logits exist a part at a time."""
    parts = hidden.flatten(0, 1).split(max(1, _LOGITS_AT_ONCE // head.shape[0]))
    return torch.cat([mm(part, head.T.to(part.dtype)).argmax(-1) for part in parts]).view(hidden.shape[:2])
