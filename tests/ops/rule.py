"""The rule for low precision, and bitwise repeatability: what every op has to keep.

On the same rounded inputs, the error of output and gradients against float64 is at most twice that of plain PyTorch code at the low
precision.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The output, then the gradient of each floating input, for a random linear functional of the output."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    output.backward(weights.to(output.dtype))
    gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [output.detach(), *gradients]  # type: ignore[list-item]


def assert_low_precision_rule(function: Function, plain: Function, *inputs: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Inputs that are float32 stay float32 in both (master weights, gate values); the others are rounded to `dtype` first."""
    exact = outputs_and_gradients(plain, [_as(tensor, torch.float64) for tensor in inputs])
    ours, theirs = outputs_and_gradients(function, inputs), outputs_and_gradients(plain, inputs)
    assert any(tensor.dtype == dtype for tensor in inputs)
    for index, (truth, one, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert one.shape == other.shape
        error, plain_error = float((one.double() - truth).norm()), float((other.double() - truth).norm())
        assert error <= 2 * plain_error + 1e-7 * float(truth.norm()), f"tensor {index}: {error:.2e} against {plain_error:.2e}"


def assert_close_in_float64(function: Function, plain: Function, *inputs: Tensor, tolerance: float = 1e-12) -> None:
    """Output and gradients equal those of autograd through the plain formula."""
    inputs = tuple(_as(tensor, torch.float64) for tensor in inputs)
    for index, (one, other) in enumerate(
        zip(outputs_and_gradients(function, inputs), outputs_and_gradients(plain, inputs), strict=True)
    ):
        assert one.dtype == torch.float64
        assert float((one - other).norm()) <= tolerance * float(other.norm()), f"tensor {index}"


def assert_repeatable(function: Function, *inputs: Tensor) -> None:
    """Three runs, the same bits; memory is left dirty in between, so that a result read from nowhere shows."""
    first = outputs_and_gradients(function, inputs)
    for _ in range(2):
        dirty = [torch.full_like(tensor, float("nan")) for tensor in first]
        del dirty
        for one, other in zip(outputs_and_gradients(function, inputs), first, strict=True):
            assert torch.equal(one, other)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
