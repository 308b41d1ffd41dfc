"""The bias-free linear product, its three matrix products, and the cases where a CPU does better than torch's general ones.

Float32 products go to MKL in torch's x86 builds. On processors with AVX-512 that are not Intel's, MKL runs at half of oneDNN's speed;
torch gives oneDNN float32 work only in convolutions and in an operation of its compiler's, which is what is called here. The rounding
differs in the last bits, as between any two libraries.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.build import grouped_kernels_for
from finback.ops.products import few_rows, mm, sum_of_products, widened, widens_autocast

_LARGE = 1 << 16  # elements of a matrix from which reading it, not starting to, is what takes the time
_FEW_ROWS = 64  # below these, starting a product in oneDNN takes longer than MKL's whole product
_FEW_SUMMED_ROWS = 256  # the same for a product that sums over rows
_COLUMNS = 4096  # of a wide product that are computed at a time: what comes out is then moved on from a cache


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """weight x: x [..., in], weight [out, in] -> [..., out].

    A single float32 row on a CPU (a decode step) goes through `vecdot`, which reads the matrix with all threads at two to three
    times the rate of the matrix-vector product.
    """
    one_row = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if one_row and weight.numel() >= _LARGE and not torch.is_grad_enabled():
        row: Tensor = torch.linalg.vecdot(weight, x.view(-1))
        return row.view(*x.shape[:-1], -1)
    if (widens_autocast(x) or widened(x, weight)) and not few_rows(x.numel() // max(1, x.shape[-1])):
        widened_result: Tensor = _WidenedLinear.apply(x, weight)
        return widened_result
    many_rows = x.numel() >= _FEW_ROWS * x.shape[-1]
    if many_rows and prefers_onednn(x, weight) and not torch.is_autocast_enabled("cpu"):
        result: Tensor = _Linear.apply(x, weight)
        return result
    return F.linear(x, weight)


class _WidenedLinear(torch.autograd.Function):
    """In float32, of x and weight rounded to bfloat16; keeps x in bfloat16, and rounds gradients where autocast rounds them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        low = x.bfloat16()
        ctx.save_for_backward(low, weight)
        ctx.dtype = x.dtype
        return mm(low.reshape(-1, x.shape[-1]), weight.bfloat16().t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        low, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = mm(rows, weight.bfloat16()).view(low.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_of_products(rows, low.reshape(-1, low.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rows_times(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = rows_times(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = sum_of_outer(rows, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def rows_times(rows: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """rows [M, P] times matrix [P, Q] -> [M, Q], in `out` if given; the matrix may be a transposed view."""
    if widened(rows, matrix) and not few_rows(len(rows)):
        product = mm(rows, matrix)
        return product if out is None else out.copy_(product)
    if rows.shape[0] < _FEW_ROWS or rows.shape[1] == 0 or not prefers_onednn(rows, matrix):
        return torch.mm(rows, matrix, out=out)
    if out is None:
        return _onednn_times(rows, matrix)
    for columns in _parts(matrix.shape[1]):  # oneDNN is not told where to write
        out[:, columns] = _onednn_times(rows, matrix[:, columns])
    return out


def _onednn_times(rows: Tensor, matrix: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, matrix.t(), None, "none", [], "")
    return product


def _parts(width: int) -> Iterator[slice]:
    return (slice(start, start + _COLUMNS) for start in range(0, width, _COLUMNS))


def sum_of_outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over rows of left_i right_i^T: [M, P], [M, Q] -> [P, Q], the weight gradient of a linear layer.

    In float32 it is the experts' C kernel that does it, or oneDNN where that is not there: then it is the weight gradient of a
    convolution with a 1x1 kernel over an image of M x 1 pixels, without transposing copies.
    """
    if left.shape[0] >= _FEW_SUMMED_ROWS and prefers_onednn(left, right):
        kernels = grouped_kernels_for(left.dtype, left.device)
        if kernels is not None:
            return kernels.outer(left, right, torch.tensor([len(left)]))[0]
        kernel = left.new_empty(1).expand(left.shape[1], right.shape[1], 1, 1)  # only its shape is looked at
        images = [t.contiguous().view(1, len(t), 1, -1).permute(0, 3, 1, 2) for t in (left, right)]
        stride, padding, dilation = [1, 1], [0, 0], [1, 1]
        _, gradient, _ = torch.ops.aten.convolution_backward(
            *images, kernel, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
        )
        weight_gradient: Tensor = gradient.view(left.shape[1], -1)
        return weight_gradient
    return sum_of_products(left, right)


def add_sum_of_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [P, Q] += `sum_of_outer(left, right)`. On a CPU a wide `left`, such as the gradient of logits, is taken by its columns."""
    if left.device.type != "cpu" or left.shape[1] <= _COLUMNS:
        total += sum_of_outer(left, right)
        return
    for columns in _parts(left.shape[1]):
        total[columns] += mm(left[:, columns].t(), right)


def prefers_onednn(*operands: Tensor) -> bool:
    """Whether these are float32 on a CPU that multiplies faster through oneDNN."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in operands) and onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Of oneDNN and MKL, if both are there: on other makers' processors than Intel's, if they have AVX-512. With AVX2 both multiply as
    fast, and oneDNN's weight gradients of convolutions take four to ten times as long.

    By maker and instructions and not by a measurement, which could turn out differently in the next process and change the bits of a
    resumed run.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and torch.cpu._is_avx512_supported()):
        return False
    try:
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    maker = re.search(r"^vendor_id\s*:\s*(\S+)", information, re.M)
    return maker is not None and maker[1] != "GenuineIntel"
