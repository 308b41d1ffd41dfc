"""The bias-free linear product, and the one case where a CPU does better than the general one."""

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGE = 1 << 16  # elements of a matrix from which reading it, not starting to, is what takes the time


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """weight x: x [..., in], weight [out, in] -> [..., out].

    A single float32 row on a CPU (a decode step) goes through `vecdot`, which reads the matrix with all threads at two to three
    times the rate of the matrix-vector product.
    """
    one_row = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if one_row and weight.numel() >= _LARGE and not torch.is_grad_enabled():
        row: Tensor = torch.linalg.vecdot(weight, x.view(-1))
        return row.view(*x.shape[:-1], -1)
    return F.linear(x, weight)
