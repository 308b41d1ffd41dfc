"""RMSNorm (V3 section 2.1; also after the compressed latents)."""

from typing import Any

import torch
from torch import Tensor

from finback.ops.native.build import training_kernels_for
from finback.ops.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension: x [..., D], weight [D] -> [..., D] in x's dtype.

    Statistics are float32 whatever the dtype. Backward recomputes the normalised rows from x, so that nothing but x itself is kept.
    On a CPU both directions are one pass in C, if there is a compiler; `normalise` and `normalise_backward` are its twins.
    """
    if not torch.is_grad_enabled():
        return _forward(x, weight, eps)[0]
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernels = training_kernels_for(x)
    return normalise(x, weight, eps) if kernels is None else kernels.rms_norm(x, weight, eps)


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [D] -> normalised [..., D] in x's dtype, and what rows were multiplied by, float32 [..., 1]."""
    scale = inverse_rms(x, eps)
    normalised = x * scale  # float32: the scale is
    return (normalised.mul_(weight) if normalised.dtype == weight.dtype else normalised * weight).to(x.dtype), scale


def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weight in float32 [D].

    With xhat = x * r: dw = sum over rows of g * xhat;  dx = r * (g w - xhat * mean(g w xhat)).
    """
    with torch.autocast(x.device.type, enabled=False):
        normalised = (x * scale).flatten(0, -2)
        product = normalised * grad.flatten(0, -2)
        weight32 = weight.to(product.dtype)
        grad_weight = torch.mv(product.T, product.new_ones(product.shape[0]))
        projection = torch.mv(product, weight32).div_(-x.shape[-1]).unsqueeze(1)
        grad_x = torch.addcmul(torch.mul(grad, weight32).view_as(product), normalised, projection)
        return grad_x.view_as(x).mul_(scale).to(x.dtype), grad_weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) per row, float32: [..., D] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    inverse: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, scale = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        kernels = training_kernels_for(x)
        backward = normalise_backward if kernels is None else kernels.rms_norm_backward
        grad_x, grad_weight = backward(grad, x, weight, scale)
        return grad_x, grad_weight.to(weight.dtype), None
