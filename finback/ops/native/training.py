"""The C kernels of a training step as Python calls on tensors: elementwise work in one pass, where torch takes several.

All tensors are on the CPU and of one dtype, float32 or bfloat16, but for those that are documented as float32 or integers.
Everything is computed in float32 and rounded once. Rows are shared out among torch's threads, and no result depends on how many
there are.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LANES = 16  # of the widest vectors: what float32 weights and sums are padded to
_PARTS = 64  # as in training.c
_ALONE = 1 << 14  # elements up to which one thread is faster than two

_SIGNATURES: dict[str, tuple[type[Any] | None, list[type[Any]]]] = {
    "rms_norm": (None, [c_void_p] * 4 + [c_int64] * 4 + [c_float]),
    "rms_norm_backward": (None, [c_void_p] * 7 + [c_int64] * 4),
    "swiglu": (None, [c_void_p] * 4 + [c_int64] * 3),
    "swiglu_backward": (None, [c_void_p] * 7 + [c_int64] * 3),
    "cross_entropy": (c_int, [c_void_p] * 4 + [c_int64] * 5),
    "causal_softmax": (None, [c_void_p] * 2 + [c_int64] * 5 + [c_float]),
    "causal_softmax_backward": (None, [c_void_p] * 2 + [c_int64] * 5 + [c_float]),
    "adamw": (None, [c_void_p] * 4 + [c_int64] * 2 + [c_float] * 8),
}


class TrainingKernels:
    """The loaded library. M is the number of rows, all leading dimensions together."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            for dtype, suffix in SUFFIXES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.restype, function.argtypes = result, arguments
                self._functions[name, dtype] = function
        self._select_experts = library.select_experts
        self._select_experts.restype, self._select_experts.argtypes = None, [c_void_p] * 2 + [c_int64] * 7

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x [..., D], weight [D] of any dtype -> normalised [..., D], scales float32 [..., 1]."""
        rows, stride = _rows(x)
        output = torch.empty(x.shape, dtype=x.dtype)
        scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
        padded = _padded(weight)
        self._functions["rms_norm", x.dtype](
            rows.data_ptr(), padded.data_ptr(), output.data_ptr(), scales.data_ptr(),
            scales.numel(), x.shape[-1], stride, _threads(x), eps,
        )  # fmt: skip
        return output, scales

    def rms_norm_backward(self, grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """grad, x [..., D], scales float32 [..., 1] -> gradients of x, and of the weight in float32 [D]."""
        rows, stride = _rows(x)
        grad = grad.contiguous()
        assert grad.dtype == x.dtype, (grad.dtype, x.dtype)
        size = x.shape[-1]
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        padded = _padded(weight)
        grad_weight = torch.empty_like(padded)
        parts = padded.new_empty(_PARTS, padded.numel())
        self._functions["rms_norm_backward", x.dtype](
            grad.data_ptr(), rows.data_ptr(), padded.data_ptr(), scales.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr(),
            parts.data_ptr(), scales.numel(), size, stride, _threads(x),
        )  # fmt: skip
        return grad_x, grad_weight[:size]

    def swiglu(self, gate: Tensor, up: Tensor, row_weight: Tensor | None) -> Tensor:
        """gate, up [..., F], row_weight float32 [...] or None -> silu(gate) * up * row_weight."""
        gate, up = gate.contiguous(), up.contiguous()
        assert gate.shape == up.shape
        assert gate.dtype == up.dtype
        weights = _row_weights(row_weight, gate)
        output = torch.empty_like(gate)
        self._functions["swiglu", gate.dtype](
            gate.data_ptr(), up.data_ptr(), _at(weights), output.data_ptr(),
            gate.numel() // max(1, gate.shape[-1]), gate.shape[-1], _threads(gate),
        )  # fmt: skip
        return output

    def swiglu_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor, row_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of gate, up and, if there are any, row weights."""
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        assert grad.dtype == gate.dtype == up.dtype
        weights = _row_weights(row_weight, gate)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate)
        grad_weights = None if weights is None else torch.empty_like(weights)
        self._functions["swiglu_backward", gate.dtype](
            grad.data_ptr(), gate.data_ptr(), up.data_ptr(), _at(weights), grad_gate.data_ptr(), grad_up.data_ptr(),
            _at(grad_weights), gate.numel() // max(1, gate.shape[-1]), gate.shape[-1], _threads(gate),
        )  # fmt: skip
        return grad_gate, grad_up, grad_weights

    def cross_entropy(self, logits: Tensor, targets: Tensor, ignore_index: int, gradient: bool) -> Tensor:
        """Losses float32 [M] of logits [M, V] and targets int64 [M]; with `gradient`, the logits become the sum's gradient."""
        assert logits.is_contiguous()
        assert targets.dtype == torch.int64
        targets = targets.contiguous()
        rows, size = logits.shape
        threads = _threads(logits)
        losses = torch.empty(rows, dtype=torch.float32)
        scratch = torch.empty(threads, size + _LANES, dtype=torch.float32)
        failed = self._functions["cross_entropy", logits.dtype](
            logits.data_ptr(),
            targets.data_ptr(),
            losses.data_ptr(),
            scratch.data_ptr(),
            rows,
            size,
            ignore_index,
            gradient,
            threads,
        )
        if failed:
            raise IndexError(f"a target is outside of the vocabulary of {size}")
        return losses

    def causal_softmax(self, scores: Tensor, start: int, scale: float) -> None:
        """scores [h, rows, columns] become softmax(scale * scores) where row r sees columns 0 to start + r, and 0 elsewhere."""
        assert scores.is_contiguous()
        heads, rows, columns = scores.shape
        assert start + rows <= columns
        threads = _threads(scores)
        scratch = torch.empty(threads, columns + _LANES, dtype=torch.float32)
        self._functions["causal_softmax", scores.dtype](
            scores.data_ptr(), scratch.data_ptr(), heads, rows, columns, start, threads, scale
        )

    def causal_softmax_backward(self, grad: Tensor, weights: Tensor, start: int, scale: float) -> None:
        """The gradient of those weights becomes the gradient of the scores."""
        assert grad.is_contiguous()
        assert weights.is_contiguous()
        assert grad.shape == weights.shape
        assert grad.dtype == weights.dtype
        self._functions["causal_softmax_backward", grad.dtype](
            grad.data_ptr(), weights.data_ptr(), *grad.shape, start, _threads(grad), scale
        )

    def select_experts(self, scores: Tensor, top_k: int, n_group: int, topk_group: int, two_per_group: bool) -> Tensor:
        """Indices int64 [N, K] of the largest of scores float32 [N, E], from the `topk_group` best of `n_group` groups only."""
        assert scores.dtype == torch.float32
        scores = scores.contiguous()
        rows, experts = scores.shape
        assert experts % n_group == 0
        assert 1 <= topk_group <= n_group
        assert top_k <= topk_group * (experts // n_group)
        indices = torch.empty(rows, top_k, dtype=torch.int64)
        self._select_experts(
            scores.data_ptr(), indices.data_ptr(), rows, experts, top_k, n_group, topk_group, two_per_group, _threads(scores)
        )
        return indices

    def adamw(
        self,
        parameter: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        scale: float,
        beta1: float,
        beta2: float,
        decay: float,
        step_size: float,
        epsilon: float,
    ) -> None:
        """One update in place: parameter and gradient float32, moments of one dtype, all contiguous and of one size.

        With g = scale * gradient: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, parameter = decay * parameter -
        step_size * m / (sqrt(v) + epsilon).
        """
        for tensor in (parameter, gradient, exp_avg, exp_avg_sq):
            assert tensor.is_contiguous()
            assert tensor.numel() == parameter.numel()
        assert parameter.dtype == gradient.dtype == torch.float32
        assert exp_avg.dtype == exp_avg_sq.dtype
        self._functions["adamw", exp_avg.dtype](
            parameter.data_ptr(), gradient.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), parameter.numel(),
            _threads(parameter), scale, beta1, 1 - beta1, beta2, 1 - beta2, decay, step_size, epsilon,
        )  # fmt: skip


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy of it, whose rows lie evenly `stride` elements apart: x [..., D]."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1:
        try:
            rows = x.view(-1, x.shape[-1])
        except RuntimeError:
            pass
        else:
            return rows, rows.stride(0)
    return x.contiguous(), x.shape[-1]


def _padded(weight: Tensor) -> Tensor:
    """float32, and with zeros up to whole vectors."""
    weight = weight.detach().to(torch.float32).contiguous()
    missing = -weight.numel() % _LANES
    return F.pad(weight, (0, missing)) if missing else weight


def _row_weights(row_weight: Tensor | None, gate: Tensor) -> Tensor | None:
    if row_weight is None:
        return None
    assert row_weight.shape == gate.shape[:-1]
    return row_weight.to(torch.float32).contiguous()


def _threads(tensor: Tensor) -> int:
    return 1 if tensor.numel() <= _ALONE else torch.get_num_threads()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
