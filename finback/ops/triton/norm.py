"""RMSNorm in Triton, both directions (`finback.ops.norm`): a program reads a row once. The floor is the row in and out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.triton.cast import rounded

_ROWS_PER_PROGRAM = 32  # of the backward pass, which adds up a part of the weight's gradient in registers


@triton.jit
def normalise_kernel(x, weight, out, inverse, size, eps, block: tl.constexpr):
    """A row of x [rows, size] -> out, and 1 / rms as float32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < size
    values = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    product = values * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, rounded(product, out.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def normalise_backward_kernel(
    grad, x, weight, inverse, grad_x, partial, rows, size, block: tl.constexpr, per_program: tl.constexpr
):
    """Rows of the input's gradient, and this program's part of the weight's, float32 [programs, size]."""
    column = tl.arange(0, block)
    inside = column < size
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for i in range(per_program):
        row = first + i
        mask = inside & (row < rows)
        g = tl.load(grad + row * size + column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)
        normalised = tl.load(x + row * size + column, mask=mask, other=0.0).to(tl.float32) * scale
        total += g * normalised
        weighted = g * factor
        projection = tl.sum(weighted * normalised, 0) / size
        tl.store(
            grad_x + row * size + column,
            rounded(scale * (weighted - normalised * projection), grad_x.dtype.element_ty),
            mask=mask,
        )
    tl.store(partial + tl.program_id(0).to(tl.int64) * size + column, total, mask=inside)


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `finback.ops.norm.normalise`."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out, inverse = torch.empty_like(flat), torch.empty(len(flat), dtype=torch.float32, device=x.device)
    if flat.numel():
        normalise_kernel[(len(flat),)](flat, weight, out, inverse, flat.shape[1], eps, triton.next_power_of_2(flat.shape[1]))
    return out.view(x.shape), inverse.view(*x.shape[:-1], 1)


def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As `finback.ops.norm.normalise_backward`."""
    flat, g = x.reshape(-1, x.shape[-1]).contiguous(), grad.reshape(-1, x.shape[-1]).contiguous()
    rows, size = flat.shape
    programs = triton.cdiv(rows, _ROWS_PER_PROGRAM)
    grad_x, partial = torch.empty_like(flat), torch.empty(programs, size, dtype=torch.float32, device=x.device)
    if flat.numel():
        normalise_backward_kernel[(programs,)](
            g,
            flat,
            weight,
            scale.reshape(-1).contiguous(),
            grad_x,
            partial,
            rows,
            size,
            triton.next_power_of_2(size),
            _ROWS_PER_PROGRAM,
        )
    return grad_x.view(x.shape), partial.sum(0)
