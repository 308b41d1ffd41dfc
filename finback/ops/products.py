"""Products of bfloat16 matrices where a CPU has no instructions for them.

torch multiplies these through oneDNN, or in plain loops on a processor for which oneDNN has nothing: at a hundredth of float32's speed
on one with AVX2. There operands are widened, multiplied in float32 and rounded once: the same product by definition, summed in another
order. `docs/devlog.md` has the figures.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_FEW_ROWS = 16  # below these, widening the matrix takes longer than torch's loops do with it
_ROWS_AT_ONCE = 256


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
        wide, product = right.float(), left.new_empty(len(left), right.shape[1])
        for rows in _parts(len(left)):
            product[rows] = torch.mm(left[rows].float(), wide)
        return product


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """left [M, P], right [M, Q] -> left^T right [P, Q]."""
    if not widened(left, right):
        return torch.mm(left.t(), right)
    with torch.autocast("cpu", enabled=False):
        total = torch.zeros(left.shape[1], right.shape[1], device=left.device)
        for rows in _parts(len(left)):
            total.addmm_(left[rows].float().t(), right[rows].float())
        return total.bfloat16()


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """left [B, M, P] right [B, P, Q] -> [B, M, Q]."""
    if not widened(left, right) or few_rows(left.shape[1]):
        return torch.bmm(left, right)
    with torch.autocast("cpu", enabled=False):
        return torch.bmm(left.float(), right.float()).bfloat16()


def _parts(rows: int) -> Iterator[slice]:
    """Rows that are widened at a time. Wide copies of everything, between what backward keeps, leave an allocator gaps that it cannot
    use: a fifth of the peak memory of a small step."""
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, rows, _ROWS_AT_ONCE))
