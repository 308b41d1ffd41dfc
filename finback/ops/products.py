"""Products of bfloat16 matrices where a CPU has no instructions for them.

torch multiplies these through oneDNN, or in plain loops on a processor for which oneDNN has nothing: at a hundredth of float32's speed
on one with AVX2. There operands are widened, multiplied in float32 and rounded once: the same product by definition, summed in another
order. `docs/devlog.md` has the figures.
"""

from functools import cache

import torch
from torch import Tensor

_FEW_ROWS = 16  # below these, widening the matrix takes longer than torch's loops do with it


def widened(*operands: Tensor) -> bool:
    """Whether the product of these is to be taken in float32: bfloat16 on a CPU that multiplies it slowly."""
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in operands) and not cpu_multiplies_bfloat16()


def widens_autocast(x: Tensor) -> bool:
    """Whether autocast, which is on for x's device, would have a CPU multiply in bfloat16 slowly."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not cpu_multiplies_bfloat16()
    )


def few_rows(rows: int) -> bool:
    """Whether so few rows are better left to torch."""
    return rows < _FEW_ROWS


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this processor: by its instructions, not by a measurement, which could turn out
    differently in the next process and change the bits of a resumed run."""
    supported: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left [M, P] right [P, Q] -> [M, Q]."""
    if not widened(left, right) or few_rows(len(left)):
        return torch.mm(left, right)
    with torch.autocast("cpu", enabled=False):
        return torch.mm(left.float(), right.float()).bfloat16()


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """left [B, M, P] right [B, P, Q] -> [B, M, Q]."""
    if not widened(left, right) or few_rows(left.shape[1]):
        return torch.bmm(left, right)
    with torch.autocast("cpu", enabled=False):
        return torch.bmm(left.float(), right.float()).bfloat16()
