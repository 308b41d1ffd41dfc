"""SwiGLU: silu(gate) * up, optionally times a routing weight per row."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.build import training_kernels_for


def swiglu(gate: Tensor, up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up * row_weight: gate, up [..., F], row_weight [...] float32 or None -> [..., F].

    Backward recomputes the activation from its inputs, so that nothing else is kept. On a CPU both directions are one pass in C, if
    there is a compiler; `activate` and `activate_backward` are its twins.
    """
    if not torch.is_grad_enabled():
        return _forward(gate, up, row_weight)
    result: Tensor = _SwiGLU.apply(gate, up, row_weight)
    return result


def _forward(gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
    kernels = training_kernels_for(gate, up)
    return activate(gate, up, row_weight) if kernels is None else kernels.swiglu(gate, up, row_weight)


def activate(gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
    """The formula, in gate's dtype."""
    activation = F.silu(gate).mul_(up)
    return activation if row_weight is None else activation.mul_(row_weight.unsqueeze(-1).to(activation.dtype))


def activate_backward(grad: Tensor, gate: Tensor, up: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up and, if there are any, row weights."""
    silu = F.silu(gate)
    grad_weight = None
    if row_weight is not None:
        grad_weight = (silu * up).mul_(grad).sum(-1, dtype=row_weight.dtype)
        grad = grad * row_weight.unsqueeze(-1).to(grad.dtype)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, silu.mul_(grad), grad_weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, row_weight)
        return _forward(gate, up, row_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, row_weight = ctx.saved_tensors
        kernels = training_kernels_for(grad, gate, up)
        backward = activate_backward if kernels is None else kernels.swiglu_backward
        return backward(grad, gate, up, row_weight)
