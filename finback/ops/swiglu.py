"""SwiGLU: silu(gate) * up, optionally times a routing weight per row."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up * row_weight: gate, up [..., F], row_weight [...] float32 or None -> [..., F].

    Backward recomputes the activation from its inputs, so that nothing else is kept.
    """
    if not torch.is_grad_enabled():
        return _swiglu(gate, up, row_weight)
    result: Tensor = _SwiGLU.apply(gate, up, row_weight)
    return result


def _swiglu(gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
    activation = F.silu(gate).mul_(up)
    return activation if row_weight is None else activation.mul_(row_weight.unsqueeze(-1).to(activation.dtype))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, row_weight)
        return _swiglu(gate, up, row_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, row_weight = ctx.saved_tensors
        silu = F.silu(gate)
        grad_weight = None
        if row_weight is not None:
            grad_weight = (silu * up).mul_(grad).sum(-1, dtype=row_weight.dtype)
            grad = grad * row_weight.unsqueeze(-1).to(grad.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, silu.mul_(grad), grad_weight
