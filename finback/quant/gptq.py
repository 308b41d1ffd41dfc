"""GPTQ: the columns of a weight are rounded one after the other, and what each one's rounding did to the layer's output is made good,
as far as it can be, by the columns that come after it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finback.config import InputError
from finback.quant.rtn import Quantised, fit_grid, from_grid, to_grid

BLOCK = 128  # columns between two updates of all that follow


def inverse_factor(hessian: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """The upper Cholesky factor of the damped Hessian's inverse, float32. Row i, divided by its diagonal, says what the columns after
    i must take of column i's error, once the columns before i are fixed. Worked out in float64.

    Raises InputError if the Hessian is not finite or not positive definite.
    """
    damped = hessian.double().clone()
    if not damped.isfinite().all():
        raise InputError("the activations of the calibration text are inf or nan; look at what the model was trained to")
    diagonal = damped.diagonal()
    unused = diagonal == 0  # inputs that no calibration token has: rounded to nearest
    diagonal[unused] = 1.0
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError:  # torch's LinAlgError is one
        raise InputError("the Hessian of the calibration text is not positive definite; raise --damping") from None
    return upper.float()


def gptq(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    bits: int,
    group_size: int,
    sym: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
) -> Quantised:
    """Quantise a weight so that its outputs on the calibration inputs x move little; `hessian` is the sum of x x^T (any multiple).

    Columns with large inputs come first, while there are many others to take their errors. With `act_order` groups are formed in that
    order; without it they stay `group_size` neighbours each, taken by their largest input.
    """
    outputs, width = weight.shape
    size = width if group_size == -1 else group_size
    order = column_order(hessian.diagonal(), width if act_order else size)
    left = weight.float()[:, order].clone()
    factor = inverse_factor(hessian[order][:, order], damping)
    values = torch.empty(outputs, width, dtype=torch.int32)
    scales, zeros = [], []
    grid = fit_grid(left[:, :size], bits, sym)
    for start, stop in _blocks(width, size):
        block, errors = left[:, start:stop], torch.zeros(outputs, stop - start)
        for column in range(start, stop):
            if column % size == 0:
                grid = fit_grid(left[:, column : column + size], bits, sym)
                scales.append(grid.scale)
                zeros.append(grid.zero)
            here = column - start
            rounded = to_grid(block[:, here : here + 1], grid, bits)
            values[:, column] = rounded[:, 0].int()
            error = (block[:, here : here + 1] - from_grid(rounded, grid)) / factor[column, column]
            block[:, here + 1 :] -= error * factor[column, column + 1 : stop]
            errors[:, here] = error[:, 0]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.argsort(order)
    turns = torch.arange(width, dtype=torch.int32)
    groups, taken = turns // size, (turns // size)[back]  # by place, and by the turn in which they were taken
    scale, zero = torch.cat(scales, 1).half(), torch.cat(zeros, 1).int()
    if act_order:
        return Quantised(values[:, back].contiguous(), scale, zero, taken)
    of_group = taken[::size].long()
    return Quantised(values[:, back].contiguous(), scale[:, of_group], zero[:, of_group], groups)


def column_order(squares: Float[Tensor, " n"], size: int) -> Int[Tensor, " n"]:
    """Columns by falling mean square of their input within each run of `size` neighbours, the runs by their largest."""
    runs = squares.view(-1, size)
    within = torch.argsort(runs, dim=1, descending=True, stable=True) + size * torch.arange(len(runs)).unsqueeze(1)
    return within[torch.argsort(runs.amax(1), descending=True, stable=True)].flatten()


def _blocks(width: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `BLOCK` columns (or one small group) in which no group is cut where it begins: a group's grid is fitted to
    columns that have taken every error before it."""
    unit = size * max(1, BLOCK // size)
    starts = range(0, width, unit)
    return [
        (begin, min(begin + BLOCK, start + unit, width))
        for start in starts
        for begin in range(start, min(start + unit, width), BLOCK)
    ]


def relative_error(
    weight: Float[Tensor, "out in"], approximation: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> float:
    """|W x - V x| / |W x| over the calibration inputs, root mean square; 0 where W x is 0 throughout."""
    difference = (weight - approximation).double()
    h = hessian.double()
    wrong, whole = ((m @ h * m).sum().clamp(min=0) for m in (difference, weight.double()))
    return float((wrong / whole).sqrt()) if whole > 0 else 0.0
