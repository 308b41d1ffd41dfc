"""The small layers: linear, RMSNorm, SwiGLU feed-forward. Parameters are allocated, not initialised."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finback.model.recompute import rebuilt
from finback.ops.linear import linear
from finback.ops.norm import rms_norm
from finback.ops.packed import PackedWeight, packed_linear
from finback.ops.swiglu import swiglu


class Linear(nn.Module):
    """y = W x, or W x + b: W [out, in] and b [out], as the published files store them. Only dense models have biases.

    `product` is how W x is computed: a pass over a finished model (`quant.fp8_training`) may set another function. `packed`, where it
    is set, is multiplied with in place of W: in inference only, and W may then have its shape but no memory.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.product: Callable[[Tensor, Tensor], Tensor] = linear
        self.packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        product = self.product(x, self.weight) if self.packed is None else packed_linear(x, self.packed)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight [D]."""

    def __init__(self, size: int, eps: float, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate x) * up x): the dense feed-forward, and the shared experts.

    `whole`, set by a pass over a finished model, computes it at once: (rows [M, D], three weights) -> [M, D].
    """

    def __init__(self, size: int, width: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_proj = Linear(size, width, device, dtype)
        self.up_proj = Linear(size, width, device, dtype)
        self.down_proj = Linear(width, size, device, dtype)
        self.whole: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Float[Tensor, "*N D"], recompute: bool = False) -> Float[Tensor, "*N D"]:
        """With `recompute`, the activation is rebuilt in backward from the two products that feed it."""
        if self.whole is not None:
            weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            return self.whole(x.flatten(0, -2), *weights).view(*x.shape[:-1], -1)
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = swiglu(gate, up)
        with rebuilt((hidden,), lambda: (swiglu(gate, up),), recompute):
            output: Tensor = self.down_proj(hidden)
        return output
