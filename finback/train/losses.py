"""The terms of the pre-training loss, as sums over tokens, and their gradient over a batch cut into micro-batches."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from finback.model.transformer import TrainOutput, Transformer
from finback.ops.cross_entropy import linear_cross_entropy
from finback.train.config import Precision, Recompute


class LossSums(NamedTuple):
    """Sums of -log p over the predicted tokens: of the main head, and of all MTP depths together."""

    main: Tensor
    mtp: Tensor


def loss_sums(output: TrainOutput, head: Float[Tensor, "vocab D"], rows: Int64[Tensor, "B T_plus_1"]) -> LossSums:
    """Position i of the main head predicts token i + 1 of its row, position i of depth k (from 0) token i + 2 + k (V3 section 2.2)."""
    main = linear_cross_entropy(output.hidden.flatten(0, 1), head, rows[:, 1:].flatten())
    mtp = main.new_zeros(())
    for depth, hidden in enumerate(output.mtp_hidden):
        mtp = mtp + linear_cross_entropy(hidden.flatten(0, 1), head, rows[:, 2 + depth :].flatten())
    return LossSums(main, mtp)


class BatchLosses(NamedTuple):
    """Means over a whole batch, without their weights; `expert_counts` int64 [routers, E] are sums."""

    loss: float
    """-log p of the main head, nats per token."""
    mtp_loss: float
    """The same of the MTP heads, averaged over depths. As in V3 every depth divides by T, though it predicts fewer tokens."""
    balance_loss: float
    """sum_i f_i P_i, averaged over sequences and summed over routers (V3 equation 17 without alpha)."""
    expert_counts: Tensor


def accumulate_gradients(
    model: Transformer,
    micro_batches: Sequence[Int64[Tensor, "_ T_plus_1"]],
    *,
    mtp_loss_coef: float,
    balance_loss_coef: float,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
) -> BatchLosses:
    """Add the gradient of loss + lambda mtp_loss + alpha balance_loss to the parameters' `.grad`.

    Everything is divided by the tokens (the balance loss: the sequences) of all micro-batches together, so the gradient is that of
    the whole batch however it is cut.
    """
    sequences = sum(rows.shape[0] for rows in micro_batches)
    tokens = sum(rows.shape[0] * (rows.shape[1] - 1) for rows in micro_batches)
    depths = max(1, model.config.num_nextn_predict_layers)
    device = micro_batches[0].device.type
    sums = torch.zeros(3, dtype=torch.float64, device=micro_batches[0].device)
    counts: Tensor | None = None
    for rows in micro_batches:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision != "fp32"):
            output = model.train_forward(rows[:, :-1], recompute=recompute)
            main, mtp = loss_sums(output, model.lm_head.weight, rows)
        balance = output.balance_loss * (rows.shape[0] / sequences)
        objective = (main + mtp_loss_coef / depths * mtp) / tokens + balance_loss_coef * balance
        objective.backward()
        sums += torch.stack(
            [main.detach().double() / tokens, mtp.detach().double() / (tokens * depths), balance.detach().double()]
        )
        counts = output.expert_counts if counts is None else counts + output.expert_counts
    assert counts is not None
    loss, mtp_loss, balance_loss = sums.tolist()  # the one wait for the device
    return BatchLosses(loss, mtp_loss, balance_loss, counts)
