"""RMSNorm (V3 section 2.1; also after the compressed latents)."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension: x [..., D], weight [D] -> [..., D] in x's dtype.

    Statistics are float32 whatever the dtype. Backward recomputes the normalised rows from x, so that nothing but x itself is kept.
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) per row, float32: [..., D] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        normalised = x * scale  # float32: the scale is
        return (normalised.mul_(weight) if normalised.dtype == weight.dtype else normalised * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        normalised = x * scale
        grad32 = grad.to(torch.float32)
        rows = (normalised * grad32).flatten(0, -2)
        grad_weight = rows.sum(0).to(weight.dtype)
        # d/dx of x * r: r * (g w - xhat * mean(g w xhat))
        projection = (rows * weight).sum(-1).div_(x.shape[-1]).view(scale.shape)
        grad_x = (grad32 * weight - normalised.mul_(projection)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None
