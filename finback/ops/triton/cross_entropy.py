"""The softmax of the head's loss and its gradient in Triton, in place over a chunk of logits (`finback.ops.cross_entropy`).

The products around it are cuBLAS's; what this saves is memory: logits are read twice and written once, nothing of their size is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.triton.cast import rounded

_BLOCK = 4096
_LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def softmax_gradient_kernel(logits, targets, losses, vocab, ignore_index, gradient: tl.constexpr, block: tl.constexpr):
    """A row of logits [rows, vocab] -> its loss; with `gradient` the row becomes softmax - onehot, or 0 where it is ignored."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    kept = target != ignore_index
    largest, total = float("-inf"), 0.0
    for start in range(0, vocab, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + row * vocab + column, mask=column < vocab, other=_LOWEST).to(tl.float32)
        higher = tl.maximum(largest, tl.max(x, 0))
        origin = tl.where(higher == _LOWEST, 0.0, higher)  # all -inf so far: they add nothing, and -inf - -inf would be nan
        total = total * tl.exp(largest - origin) + tl.sum(tl.exp(x - origin), 0)
        largest = higher
    log_total = tl.log(total) + largest
    own = tl.load(logits + row * vocab + tl.where(kept, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(kept, log_total - own, 0.0))
    if gradient:
        for start in range(0, vocab, block):
            column = start + tl.arange(0, block)
            x = tl.load(logits + row * vocab + column, mask=column < vocab, other=_LOWEST).to(tl.float32)
            value = tl.exp(x - log_total) - (column == target).to(tl.float32)
            value = tl.where(kept, value, 0.0)
            tl.store(logits + row * vocab + column, rounded(value, logits.dtype.element_ty), mask=column < vocab)


def softmax_gradient(logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """As `finback.ops.cross_entropy.softmax_gradient`; `logits` must be contiguous, since they are written to."""
    rows, vocab = logits.shape
    if not logits.is_contiguous():
        raise ValueError(f"logits of shape {list(logits.shape)} and stride {logits.stride()} must be contiguous")
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocab))
        softmax_gradient_kernel[(rows,)](logits, targets, losses, vocab, ignore_index, gradient, block, num_warps=8)
    return losses
