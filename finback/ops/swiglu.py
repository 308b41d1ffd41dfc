"""SwiGLU: silu(gate) * up, optionally times a routing weight per row."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


def swiglu(gate_up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """gate_up [..., 2F], gate first -> silu(gate) * up * row_weight [..., F]; row_weight [...] float32 or None.

    Backward recomputes the activation from its inputs (V3 section 3.2.3), so that only gate_up is kept.
    """
    result: Tensor = _SwiGLU.apply(gate_up, row_weight)  # type: ignore[no-untyped-call]
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor, row_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, row_weight)
        gate, up = gate_up.chunk(2, dim=-1)
        activation = F.silu(gate).mul_(up)
        if row_weight is not None:
            activation.mul_(row_weight.unsqueeze(-1).to(activation.dtype))
        return activation

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, row_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        gate, up = gate_up.chunk(2, dim=-1)
        width = gate.shape[-1]
        silu = F.silu(gate)
        grad_weight = None
        if row_weight is not None:
            grad_weight = (silu * up * grad).sum(-1, dtype=torch.float32)
            grad = grad * row_weight.unsqueeze(-1).to(grad.dtype)
        grad_gate_up = torch.empty_like(gate_up)
        torch.mul(grad, silu, out=grad_gate_up[..., width:])
        grad_gate_up[..., :width] = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate_up, grad_weight
