"""The output head and its loss in one, so that the logits of a whole batch never exist at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.linear import add_sum_of_outer, rows_times
from finback.ops.native.build import training_kernels_for
from finback.ops.precision import wide

_CHUNK_ELEMENTS = 1 << 21  # logits alive at a time: few enough for a shared cache, enough for few sums over chunks
_CHUNK_ROWS = 256  # at least, however large the vocabulary: with fewer, adding up the head's gradient costs what its product does


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum of -log softmax(weight hidden)[target] over rows: hidden [N, D], weight [vocab, D], targets int64 [N] -> float32 scalar.

    Rows whose target is `ignore_index` count nothing. Matrix products run in hidden's dtype, the softmax in float32. The gradients
    are computed along with the loss, chunk by chunk: 3 products in all, nothing recomputed.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return _loss_and_gradients(hidden, weight, targets, ignore_index, False, False)[0]
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)
    return result


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(hidden.dtype)
        dtype = wide(hidden.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        rows = _chunk_rows(hidden, weight)
        buffer = hidden.new_empty(rows, weight.shape[0])  # one for all chunks: fresh memory costs as much as the softmax
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows]
            logits = rows_times(part, matrix.T, out=buffer[: part.shape[0]])
            kernels = training_kernels_for(logits)
            if kernels is None:
                losses = softmax_gradient(logits, target, ignore_index, want_hidden or want_weight)
            else:
                losses = kernels.cross_entropy(logits, target, ignore_index, want_hidden or want_weight)
            total += losses.sum()
            if grad_hidden is not None:
                rows_times(logits, matrix, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                add_sum_of_outer(grad_weight, logits, part)
    return total, grad_hidden, grad_weight


def _chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    return max(1, min(max(_CHUNK_ROWS, _CHUNK_ELEMENTS // weight.shape[0]), hidden.shape[0]))


def softmax_gradient(logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] per row, float32 [N]; with `gradient`, the logits [N, vocab] become the gradient of the sum.

    On a CPU this is one pass in C, if there is a compiler; here is its twin.
    """
    kept = targets != ignore_index
    index = targets.where(kept, 0).unsqueeze(1)
    log_probs = F.log_softmax(logits, dim=-1, dtype=wide(logits.dtype))
    losses = -log_probs.gather(1, index).squeeze(1) * kept
    if gradient:
        grad_logits = log_probs.exp_()
        grad_logits.scatter_add_(1, index, torch.full_like(index, -1, dtype=log_probs.dtype))
        logits.copy_(grad_logits.mul_(kept.unsqueeze(1)))
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        loss, grad_hidden, grad_weight = _loss_and_gradients(hidden, weight, targets, ignore_index, want_hidden, want_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
        weight_scaled = None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype)
        return scaled, weight_scaled, None, None


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(weight hidden)[target] of each row: hidden [N, D], weight [vocab, D], targets int64 [N] -> float32 [N].

    As `linear_cross_entropy`, but each row's gradient may have its own weight, which is known only once the values are: backward
    makes the logits again, chunk by chunk.
    """
    result: Tensor = _LinearLogProbs.apply(hidden, weight, targets)
    return result


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        losses = [_chunk_losses(logits, target, False) for _, logits, target in _logits_by_chunk(hidden, weight, targets)]
        return torch.cat(losses).neg() if losses else hidden.new_zeros(0, dtype=wide(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(hidden.dtype)
            grad_hidden = torch.empty_like(hidden) if want_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=wide(hidden.dtype)) if want_weight else None
            for rows, logits, target in _logits_by_chunk(hidden, weight, targets):
                _chunk_losses(logits, target, True)
                logits.mul_(grad[rows].neg().unsqueeze(1).to(logits.dtype))
                if grad_hidden is not None:
                    rows_times(logits, matrix, out=grad_hidden[rows])
                if grad_weight is not None:
                    add_sum_of_outer(grad_weight, logits, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _logits_by_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their logits, their targets) in a buffer that the next chunk overwrites."""
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(hidden.dtype)
        count = _chunk_rows(hidden, weight)
        buffer = hidden.new_empty(count, weight.shape[0])
        for start in range(0, hidden.shape[0], count):
            rows = slice(start, min(start + count, hidden.shape[0]))
            yield rows, rows_times(hidden[rows], matrix.T, out=buffer[: rows.stop - start]), targets[rows]


def _chunk_losses(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    kernels = training_kernels_for(logits)
    if kernels is None:
        return softmax_gradient(logits, targets, -100, gradient)
    return kernels.cross_entropy(logits, targets, -100, gradient)
