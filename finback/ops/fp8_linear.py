"""Linear layers trained in FP8, as V3 trains them (section 3.3): every product of forward and backward takes E4M3 operands.

    Fprop   y  = Q(x) Q(W)^T        x in 1 x 128 tiles, W in 128 x 128 blocks
    Dgrad   dx = Q(dy) Q(W)         dy in 1 x 128 tiles over the output channels, the same blocks of W
    Wgrad   dW = Q'(dy)^T Q'(x)     both in tiles of 128 tokens x 1 channel, since the sum runs over tokens

Backward keeps x as the FP8 payload that forward multiplied, dequantises it and quantises it again in the other direction. Weights,
their gradients and the sums within a product stay float32; what goes in and comes out has the dtype of the activations.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from finback.ops.e5m6 import dequantize_e5m6, quantize_e5m6
from finback.ops.fp8 import dequantize_1x128, quantize_1x128, quantize_128x128
from finback.ops.fp8_product import dequantized_gemm
from finback.ops.swiglu import activate, activate_backward

_SMALLEST_GRADIENT_AMAX = 0.0  # a bound such as that of activations would push the small gradients of a large batch to zero


class Recipe(NamedTuple):
    """What of the recipe can be chosen."""

    ue8m0: bool = False
    """Round every scale up to a power of two, and not only those of the tensors that V3 names."""
    gradient_tiles: Literal["1x128", "128x128"] = "1x128"
    """128x128: the output gradients in blocks, which the paper found to diverge (appendix B.2)."""


V3 = Recipe()


class Quantized(NamedTuple):
    """A payload in E4M3 and its scales."""

    payload: Tensor
    scale: Tensor

    @property
    def values(self) -> Tensor:
        return dequantize_1x128(self.payload, self.scale)


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe = V3) -> Tensor:
    """weight x in FP8: x [..., in], weight [out, in] -> [..., out] in x's dtype."""
    result: Tensor = _FP8Linear.apply(x, weight, recipe)
    return result


def fp8_linear_after_attention(x: Tensor, weight: Tensor, recipe: Recipe = V3) -> Tensor:
    """The same for the projection behind attention: what backward keeps of x is E5M6, whose scales are powers of two."""
    result: Tensor = _FP8LinearE5M6.apply(x, weight, recipe)
    return result


def fp8_swiglu_feed_forward(
    rows: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    counts: Tensor | None = None,
    row_weight: Tensor | None = None,
    recipe: Recipe = V3,
) -> Tensor:
    """down(silu(gate x) * up x * row_weight) in FP8, of one feed-forward or of experts.

    rows [M, D]; without `counts`, gate_proj and up_proj are [F, D] and down_proj [D, F]. With int64 counts [E], the rows are sorted by
    expert, the weights have a first dimension E, and inputs and output gradients, which travel between devices in FP8, have scales
    that are powers of two. row_weight is float32 [M] or None.

    Backward keeps the input and the two inputs of SwiGLU in FP8 and computes the activation again.
    """
    result: Tensor = _FP8FeedForward.apply(rows, gate_proj, up_proj, down_proj, counts, row_weight, recipe)
    return result


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            inputs, blocks = _activation(rows, recipe.ue8m0), _weight(weight, recipe)
            ctx.save_for_backward(*inputs, *blocks)
            ctx.recipe = recipe
            return _product(inputs, blocks, _compute_dtype(x)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        payload, scale, *blocks = ctx.saved_tensors
        inputs = Quantized(payload, scale).values
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x, grad_weight = _backward(rows, inputs, Quantized(*blocks), ctx.recipe)
        return grad_x.view(*grad.shape[:-1], -1), grad_weight, None


class _FP8LinearE5M6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            inputs, blocks = _activation(rows, recipe.ue8m0), _weight(weight, recipe)
            ctx.save_for_backward(*quantize_e5m6(rows), *blocks)
            ctx.recipe = recipe
            return _product(inputs, blocks, _compute_dtype(x)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        packed, scale, *blocks = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x, grad_weight = _backward(rows, dequantize_e5m6(packed, scale), Quantized(*blocks), ctx.recipe)
        return grad_x.view(*grad.shape[:-1], -1), grad_weight, None


class _FP8FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        counts: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
    ) -> Tensor:
        dtype, travels = _compute_dtype(rows), counts is not None
        sizes = [rows.shape[0]] if counts is None else counts.tolist()
        with torch.autocast(rows.device.type, enabled=False):
            inputs = _activation(rows, recipe.ue8m0 or travels)
            blocks = [
                [_weight(matrix, recipe) for matrix in ([weight] if counts is None else weight)]
                for weight in (gate_proj, up_proj, down_proj)
            ]
            gate, up = (_grouped(inputs, matrices, sizes, dtype) for matrices in blocks[:2])
            hidden = _activation(activate(gate, up, row_weight), recipe.ue8m0)
            output = _grouped(hidden, blocks[2], sizes, dtype)
            kept = (*inputs, *_activation(gate, recipe.ue8m0), *_activation(up, recipe.ue8m0))
        flat = (tensor for matrices in blocks for matrix in matrices for tensor in matrix)
        ctx.save_for_backward(*kept, row_weight, *flat)
        ctx.sizes, ctx.dtype, ctx.recipe, ctx.travels = sizes, dtype, recipe, travels
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale, gate, gate_scale, up, up_scale, row_weight, *flat = ctx.saved_tensors
        pairs = [Quantized(*flat[i : i + 2]) for i in range(0, len(flat), 2)]
        experts = len(ctx.sizes)
        gates, ups, downs = pairs[:experts], pairs[experts : 2 * experts], pairs[2 * experts :]
        recipe: Recipe = ctx.recipe
        gate_values, up_values = (dequantize_1x128(*kept, ctx.dtype) for kept in ((gate, gate_scale), (up, up_scale)))

        # Down: what arrives is quantised once where it travels between devices, and read from that in both directions.
        arrived = _gradient(grad, recipe, ue8m0=ctx.travels)
        source = arrived.values if ctx.travels else grad
        grad_hidden = _grouped(arrived, [_transposed(block) for block in downs], ctx.sizes, ctx.dtype)
        hidden = activate(gate_values, up_values, row_weight)
        grad_down = _weight_gradients(source, hidden, ctx.sizes, recipe)

        grad_gate, grad_up, grad_row_weight = activate_backward(grad_hidden, gate_values, up_values, row_weight)
        inputs = Quantized(x, x_scale).values
        grad_rows = _grouped(_gradient(grad_gate, recipe), [_transposed(block) for block in gates], ctx.sizes, torch.float32)
        grad_rows += _grouped(_gradient(grad_up, recipe), [_transposed(block) for block in ups], ctx.sizes, torch.float32)
        by_token = [_over_tokens(part, recipe) for part in inputs.split(ctx.sizes)]
        grads = [_weight_gradients(part, by_token, ctx.sizes, recipe) for part in (grad_gate, grad_up)]
        if not ctx.travels:
            grads, grad_down = [part[0] for part in grads], grad_down[0]
        return grad_rows.to(grad.dtype), *grads, grad_down, None, grad_row_weight, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a layer gives out: x's dtype, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _activation(rows: Tensor, ue8m0: bool) -> Quantized:
    return Quantized(*quantize_1x128(rows, ue8m0=ue8m0))


def _weight(matrix: Tensor, recipe: Recipe) -> Quantized:
    return Quantized(*quantize_128x128(matrix, ue8m0=recipe.ue8m0))


def _gradient(rows: Tensor, recipe: Recipe, ue8m0: bool = False) -> Quantized:
    """An output gradient [M, out], for Dgrad."""
    ue8m0 = ue8m0 or recipe.ue8m0
    if recipe.gradient_tiles == "128x128":
        payload, scale = quantize_128x128(rows, ue8m0=ue8m0)
        return Quantized(payload, scale.repeat_interleave(128, dim=0)[: len(rows)])
    return Quantized(*quantize_1x128(rows, ue8m0=ue8m0, smallest_amax=_SMALLEST_GRADIENT_AMAX))


def _over_tokens(rows: Tensor, recipe: Recipe) -> Quantized:
    """Rows [M, N] in tiles of 128 tokens x 1 channel: payload [N, M], scales [N, ceil(M / 128)]."""
    return Quantized(*quantize_1x128(rows.t(), ue8m0=recipe.ue8m0, smallest_amax=_SMALLEST_GRADIENT_AMAX))


def _transposed(blocks: Quantized) -> Quantized:
    """A weight for Dgrad. A ragged or square block is the same block lying down."""
    return Quantized(blocks.payload.t(), blocks.scale.t())


def _product(left: Quantized, right: Quantized, dtype: torch.dtype) -> Tensor:
    return dequantized_gemm(*left, *right, dtype)


def _grouped(rows: Quantized, matrices: list[Quantized], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of group e times matrices[e]^T."""
    payloads, scales = rows.payload.split(sizes), rows.scale.split(sizes)
    parts = zip(payloads, scales, matrices, strict=True)
    return torch.cat([_product(Quantized(payload, scale), matrix, dtype) for payload, scale, matrix in parts])


def _backward(rows: Tensor, inputs: Tensor, blocks: Quantized, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Gradients of a layer's input, in the dtype of `rows`, and of its weight, in float32."""
    grad_x = _product(_gradient(rows, recipe), _transposed(blocks), rows.dtype)
    return grad_x, _product(_over_tokens(rows, recipe), _over_tokens(inputs, recipe), torch.float32)


def _weight_gradients(grad: Tensor, inputs: Tensor | list[Quantized], sizes: list[int], recipe: Recipe) -> Tensor:
    """Wgrad of every group, [E, out, in]: its tiles end where the group ends."""
    by_token = [_over_tokens(part, recipe) for part in inputs.split(sizes)] if isinstance(inputs, Tensor) else inputs
    return torch.stack(
        [
            _product(_over_tokens(part, recipe), other, torch.float32)
            for part, other in zip(grad.split(sizes), by_token, strict=True)
        ]
    )
