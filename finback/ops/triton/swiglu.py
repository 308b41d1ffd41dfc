"""SwiGLU in Triton, both directions, and with the FP8 cast of its result (`finback.ops.swiglu`, `finback.ops.fp8`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.fp8 import FP8, SMALLEST_ACTIVATION_AMAX, TILE
from finback.ops.triton.cast import rounded
from finback.ops.triton.fp8 import _amax, _codes, _finished_scale

_BLOCK = 1024


@triton.jit
def _activation(gate, up):
    """silu(gate) up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def activate_kernel(gate, up, row_weight, out, width, weighted: tl.constexpr, block: tl.constexpr):
    """out [rows, width] = silu(gate) up row_weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    place = row * width + column
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    result = _activation(g, tl.load(up + place, mask=inside, other=0.0).to(tl.float32))
    if weighted:
        result *= tl.load(row_weight + row)
    tl.store(out + place, rounded(result, out.dtype.element_ty), mask=inside)


@triton.jit
def activate_backward_kernel(
    grad, gate, up, row_weight, grad_gate, grad_up, grad_weight, width, weighted: tl.constexpr, block: tl.constexpr
):
    """A row's gradients; the whole row is one program's, for the sum over it."""
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    factor = 1.0
    if weighted:
        factor = tl.load(row_weight + row)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        inside = column < width
        place = row * width + column
        d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        silu = g * sigmoid
        total += tl.sum(d * silu * u, 0)
        d *= factor
        slope = sigmoid + silu * (1.0 - sigmoid)
        tl.store(grad_gate + place, rounded(d * u * slope, grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + place, rounded(d * silu, grad_up.dtype.element_ty), mask=inside)
    if weighted:
        tl.store(grad_weight + row, total)


@triton.jit
def activate_quantize_kernel(
    gate, up, row_weight, payload, scale, rows, width, tiles, smallest_amax,
    weighted: tl.constexpr, ue8m0: tl.constexpr, block_rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The activation in 1 x 128 tiles of E4M3, without a copy in between; rounded to gate's dtype first, as the two steps do it."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None] * width + column[None, :]
    g = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    values = _activation(g, tl.load(up + place, mask=mask, other=0.0).to(tl.float32))
    if weighted:
        values *= tl.load(row_weight + row, mask=row < rows, other=0.0)[:, None]
    values = rounded(values, gate.dtype.element_ty).to(tl.float32)
    bounded = tl.maximum(_amax(values, 1), smallest_amax, propagate_nan=tl.PropagateNan.ALL)
    factor = _finished_scale(bounded, ue8m0)
    tl.store(payload + place, _codes(values, factor[:, None]), mask=mask)
    tl.store(scale + row * tiles + tl.program_id(1), factor, mask=row < rows)


def activate(gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
    """As `finback.ops.swiglu.activate`, rounded once at the end."""
    gate, up = gate.contiguous(), up.contiguous()  # before the results take over their strides
    rows, width = _flat_shape(gate)
    out = torch.empty_like(gate)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        activate_kernel[(rows, triton.cdiv(width, block))](
            gate, up, _weights(row_weight, gate), out, width, row_weight is not None, block
        )
    return out


def activate_backward(grad: Tensor, gate: Tensor, up: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `finback.ops.swiglu.activate_backward`."""
    gate, up = gate.contiguous(), up.contiguous()
    rows, width = _flat_shape(gate)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    grad_weight = None if row_weight is None else torch.empty(row_weight.shape, dtype=row_weight.dtype, device=row_weight.device)
    if gate.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        activate_backward_kernel[(rows,)](
            grad.contiguous(), gate, up, _weights(row_weight, gate), grad_gate, grad_up,
            grad_gate if grad_weight is None else grad_weight, width, row_weight is not None, block,
        )  # fmt: skip
    return grad_gate, grad_up, grad_weight


def activate_quantize(
    gate: Tensor, up: Tensor, row_weight: Tensor | None, *, ue8m0: bool = False, smallest_amax: float = SMALLEST_ACTIVATION_AMAX
) -> tuple[Tensor, Tensor]:
    """quantize_1x128(activate(...)) in one pass: gate, up [M, F] -> payload [M, F], scales [M, ceil(F / 128)]."""
    rows, width = gate.shape
    tiles = -(-width // TILE)
    payload = torch.empty(gate.shape, dtype=FP8, device=gate.device)
    scale = torch.empty(rows, tiles, dtype=torch.float32, device=gate.device)
    if gate.numel():
        block_rows = 32
        activate_quantize_kernel[(triton.cdiv(rows, block_rows), tiles)](
            gate.contiguous(), up.contiguous(), _weights(row_weight, gate), payload, scale, rows, width, tiles, smallest_amax,
            row_weight is not None, ue8m0, block_rows, TILE,
        )  # fmt: skip
    return payload, scale


def _flat_shape(x: Tensor) -> tuple[int, int]:
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


def _weights(row_weight: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read where there are no weights."""
    return other if row_weight is None else row_weight.contiguous()
