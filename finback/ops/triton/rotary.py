"""The rotation of interleaved pairs in Triton (`finback.ops.rotary.apply_rotary`). Its gradient is the rotation by the other angle."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.triton.cast import rounded


@triton.jit
def rotate_kernel(x, cos, sin, out, vectors, heads, half, direction, block: tl.constexpr, width: tl.constexpr):
    """x [vectors, 2 half]; vector i has the angles of row i // heads of cos and sin [., half]; direction 1, or -1 for backward."""
    vector = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    pair = tl.arange(0, width)
    inside = (vector[:, None] < vectors) & (pair[None, :] < half)
    both = tl.arange(0, 2 * width)
    place = vector[:, None] * 2 * half + both[None, :]
    mask = (vector[:, None] < vectors) & (both[None, :] < 2 * half)
    values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(values, (block, width, 2)))
    angle = (vector[:, None] // heads) * half + pair[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0) * direction
    rotated = tl.join(real * c - imaginary * s, imaginary * c + real * s)
    tl.store(out + place, rounded(tl.reshape(rotated, (block, 2 * width)), out.dtype.element_ty), mask=mask)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `finback.ops.rotary.apply_rotary`, for cos and sin that broadcast over whole dimensions of x (heads) behind those that they
    have."""
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = x.shape[-1] // 2
    table = torch.broadcast_to(cos, (*x.shape[:-1], half)), torch.broadcast_to(sin, (*x.shape[:-1], half))
    heads = 1
    for dim in range(x.dim() - 2, -1, -1):  # trailing dimensions in which the angle does not change
        if cos.dim() > x.dim() - 1 - dim and cos.shape[dim - x.dim()] != 1:
            break
        heads *= x.shape[dim]
        table = table[0].select(dim, 0), table[1].select(dim, 0)
    flat = x.contiguous()
    out = torch.empty_like(flat)
    vectors, block = flat.numel() // max(1, x.shape[-1]), 16
    if vectors:
        angles = [t.float().contiguous() for t in table]
        rotate_kernel[(triton.cdiv(vectors, block),)](
            flat, *angles, out, vectors, heads, half, direction, block, triton.next_power_of_2(half)
        )
    return out
