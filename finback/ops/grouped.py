"""The grouped expert product: rows sorted by expert, each multiplied by its own expert's matrix; and the sorting itself."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.linear import onednn_is_faster, prefers_onednn, rows_times, sum_of_outer
from finback.ops.native.build import grouped_kernels_for
from finback.ops.native.grouped import GroupedKernels
from finback.ops.products import bmm, mm, widened

_FEW_ROWS = 16  # of a group on average, from which the C kernels are faster


class Dispatch(NamedTuple):
    """Token-expert pairs in expert order, each expert's rows filled up to a multiple of the alignment: M rows in all.

    No pair is ever dropped. A filling row repeats pair 0 with weight 0: it computes something finite that nothing reads.
    """

    order: Tensor  # int64 [M]: the pair (token * K + choice) that stands in each row
    token: Tensor  # int64 [M]: its token
    real: Tensor | None  # float32 [M]: 1, and 0 for filling rows; None where there are none
    inverse: Tensor  # int64 [N * K]: the row in which each pair stands
    rows: Tensor  # int64 [E]: rows of each expert, filling included


def dispatch_order(expert_indices: Tensor, n_experts: int, alignment: int = 1) -> Dispatch:
    """Sort the pairs of expert_indices [N, K] by expert, stably (tokens stay in order within an expert)."""
    choices = expert_indices.shape[1]
    flat = expert_indices.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=n_experts)
    row, real = torch.arange(order.numel(), device=order.device), None
    if alignment > 1:
        rows = (counts + alignment - 1) // alignment * alignment
        shift = (rows - counts).cumsum(0) - (rows - counts)  # filling rows before each expert
        row = row + shift.repeat_interleave(counts, output_size=order.numel())
        total = int(rows.sum())
        order, packed = order.new_zeros(total), order
        order[row] = packed
        real = torch.zeros(total, dtype=torch.float32, device=order.device)
        real[row] = 1.0
        counts, pairs = rows, packed
    else:
        pairs = order
    inverse = torch.empty_like(flat)
    inverse[pairs] = row
    return Dispatch(order, order // choices, real, inverse, counts)


def row_alignment(rows: int, n_experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """The multiple to which each expert's rows are filled up: 1 where the C kernels multiply.

    oneDNN, which multiplies bfloat16 on CPUs and on some of them float32, compiles a kernel for every new row count, and routing
    makes new ones at every step: with few distinct counts it runs three times as fast. At most about 6% of the rows are filling; 1
    where it would not pay.
    """
    if _native(rows, n_experts, dtype, device) is not None:
        return 1
    if device.type != "cpu" or not (dtype == torch.bfloat16 or (dtype == torch.float32 and onednn_is_faster())):
        return 1
    average = rows // n_experts
    return 1 << max(0, min(6, (average // 8).bit_length() - 1))


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Copy each token's row to the place of each of its pairs: [N, D] -> [M, D]."""
    result: Tensor = _Permute.apply(x, dispatch.token, dispatch.inverse)
    return result


def unpermute(y: Tensor, dispatch: Dispatch, tokens: int) -> Tensor:
    """Add up the rows of each token: [M, D] -> [N, D]. Summed in choice order, so the result is deterministic.

    Filling rows are not read. Their gradient is that of token 0: finite, and stopped by the weight 0 of the row.
    """
    result: Tensor = _Unpermute.apply(y, dispatch.token, dispatch.inverse, tokens)
    return result


def _gather_sum(rows: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    return F.embedding_bag(inverse.view(tokens, -1), rows, mode="sum")  # gathers and adds in one pass


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = x.shape[0]
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _gather_sum(grad, inverse, ctx.tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, inverse: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token)
        return _gather_sum(y, inverse, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None


def gathered_linear(x: Tensor, weight: Tensor, dispatch: Dispatch) -> Tensor:
    """`grouped_linear` of the permuted rows, which the C kernels need not build: x [N, D], weight [E, F, D] -> [M, F]."""
    kernels = _native_gathering(x, weight, dispatch)
    if kernels is None:
        return grouped_linear(permute(x, dispatch), weight, dispatch.rows)
    result: Tensor = _GatheredLinear.apply(x, weight, dispatch, kernels)
    return result


def summed_linear(y: Tensor, weight: Tensor, dispatch: Dispatch, tokens: int) -> Tensor:
    """`unpermute` of `grouped_linear`, whose gradient is not permuted but read by row: y [M, F], weight [E, D, F] -> [N, D]."""
    kernels = _native_gathering(y, weight, dispatch)
    if kernels is None:
        return unpermute(grouped_linear(y, weight, dispatch.rows), dispatch, tokens)
    result: Tensor = _SummedLinear.apply(y, weight, dispatch, tokens, kernels)
    return result


def _native_gathering(x: Tensor, weight: Tensor, dispatch: Dispatch) -> GroupedKernels | None:
    """The C kernels, where they take all three products of a layer with this weight."""
    if dispatch.real is not None or x.dtype != weight.dtype:
        return None
    kernels = _native(len(dispatch.token), len(dispatch.rows), x.dtype, x.device)
    return kernels if kernels is not None and all(kernels.take(size, x.dtype) for size in weight.shape[1:]) else None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dispatch: Dispatch, kernels: GroupedKernels) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dispatch, ctx.kernels = dispatch, kernels
        return kernels.product(x, weight.transpose(1, 2), dispatch.rows, dispatch.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        kernels: GroupedKernels = ctx.kernels
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _gather_sum(kernels.product(grad, weight, dispatch.rows), dispatch.inverse, len(x))
        if ctx.needs_input_grad[1]:
            grad_weight = kernels.outer(grad, x, dispatch.rows, right_order=dispatch.token)
        return grad_x, grad_weight, None, None


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, dispatch: Dispatch, tokens: int, kernels: GroupedKernels) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.dispatch, ctx.kernels = dispatch, kernels
        return _gather_sum(kernels.product(y, weight.transpose(1, 2), dispatch.rows), dispatch.inverse, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y, weight = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        kernels: GroupedKernels = ctx.kernels
        grad_y = kernels.product(grad, weight, dispatch.rows, dispatch.token) if ctx.needs_input_grad[0] else None
        grad_weight = kernels.outer(grad, y, dispatch.rows, left_order=dispatch.token) if ctx.needs_input_grad[1] else None
        return grad_y, grad_weight, None, None, None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y[i] = weight[e] x[i] for the rows i of expert e: x [M, D] sorted by expert, weight [E, F, D], counts int64 [E] -> [M, F]."""
    result: Tensor = _GroupedLinear.apply(x, weight, counts)
    return result


def grouped_linear_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The definition of `grouped_linear`, one expert after another: its plain twin."""
    return torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(counts.tolist()), weight, strict=True)])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return _grouped_product(x, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _grouped_product(grad, weight, counts) if ctx.needs_input_grad[0] else None
        grad_weight = _grouped_outer(grad, x, counts) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _fused(*operands: Tensor) -> bool:
    """Whether torch's grouped kernel takes these: rows of a multiple of 16 bytes, in bfloat16 or, on CPUs, float32."""
    return all(
        (t.dtype == torch.bfloat16 or (t.dtype == torch.float32 and t.device.type == "cpu"))
        and all(size * t.element_size() % 16 == 0 for size in t.shape[-2:] if t.dim() == 3)
        and t.shape[-1] * t.element_size() % 16 == 0
        for t in operands
    )


def _native(rows: int, groups: int, dtype: torch.dtype, device: torch.device) -> GroupedKernels | None:
    """The C kernels, where they are faster: with fewer rows of a group on average, what takes the time is packing its matrix."""
    few = rows < _FEW_ROWS * groups
    return None if few or (dtype == torch.float32 and _mkl_is_faster()) else grouped_kernels_for(dtype, device)


def _mkl_is_faster() -> bool:
    """Whether float32 is better multiplied by MKL, one expert after another: on Intel's processors with AVX-512."""
    return torch.cpu._is_avx512_supported() and not onednn_is_faster()


def _grouped_product(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Rows of group e times matrices[e]: [M, P], [E, P, Q] -> [M, Q]."""
    kernels = _native(len(x), len(counts), x.dtype, x.device)
    if kernels is not None and kernels.take(x.shape[1], x.dtype):
        return kernels.product(x, matrices, counts)
    if widened(x, matrices):
        return _grouped_product(x.float(), matrices.float(), counts).bfloat16()
    if prefers_onednn(x, matrices):
        return torch.cat([rows_times(rows, matrix) for rows, matrix in zip(x.split(counts.tolist()), matrices, strict=True)])
    if _fused(x, matrices):
        return torch._grouped_mm(x, matrices, offs=counts.cumsum(0).to(torch.int32))
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(counts.tolist()), matrices, strict=True)])


def _grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Sum over the rows of group e of left_i right_i^T: [M, P], [M, Q] -> [E, P, Q]; zero for an empty group."""
    kernels = _native(len(left), len(counts), left.dtype, left.device)
    if kernels is not None:
        return kernels.outer(left, right, counts)
    if widened(left, right):
        return _grouped_outer(left.float(), right.float(), counts).bfloat16()
    if prefers_onednn(left, right):
        return torch.stack([sum_of_outer(a, b) for a, b in zip(*(t.split(counts.tolist()) for t in (left, right)), strict=True)])
    if _fused(left, right):
        return torch._grouped_mm(left.t(), right, offs=counts.cumsum(0).to(torch.int32))
    sizes = counts.tolist()
    return torch.stack([a.T @ b for a, b in zip(left.split(sizes), right.split(sizes), strict=True)])


def few_tokens(x: Tensor, indices: Tensor, values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """The whole expert layer for the few rows of a decode step on a CPU, without sorting: x [N, D], indices, values [N, K], gate and
    up [E, F, D], down [E, D, F] -> [N, D]; None where the sorted product is faster. No gradients.

    Where most experts are needed anyway, every row goes through all of them in three large products, and what it was not sent to is
    multiplied by 0; a single row, or rows that need few of many experts, visit theirs one after another.
    """
    tokens, choices = indices.shape
    if x.device.type != "cpu":
        return None
    if gate.shape[0] <= 4 * tokens * choices and 1 < tokens + (x.dtype == torch.bfloat16) <= (
        64 if x.dtype == torch.bfloat16 else 24
    ):
        return _all_experts(x, indices, values, gate, up, down)
    if tokens * choices <= 16:
        return _one_by_one(x, indices, values, gate, up, down)
    return None


def _all_experts(x: Tensor, indices: Tensor, values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    count, width, size = gate.shape
    weight = torch.zeros(x.shape[0], count, dtype=x.dtype).scatter_(1, indices, values.to(x.dtype))
    hidden = F.silu(mm(x, gate.view(-1, size).T)).mul_(mm(x, up.view(-1, size).T))
    hidden = hidden.view(-1, count, width).mul_(weight.unsqueeze(-1))
    return bmm(hidden.transpose(0, 1), down.transpose(1, 2)).sum(0)


def _one_by_one(x: Tensor, indices: Tensor, values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    output = torch.zeros_like(x)
    for row, total, experts, weights in zip(x, output, indices.tolist(), values.tolist(), strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            hidden = F.silu(torch.mv(gate[expert], row)).mul_(torch.mv(up[expert], row))
            total.addmv_(down[expert], hidden, alpha=weight)
    return output
