"""The rule for low precision without gradients, and the kernels of this machine."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from finback.ops.native.build import COMPILERS, kernels
from finback.ops.native.calls import Kernels

DTYPES = [torch.float32, torch.bfloat16]


def compiled() -> Kernels:
    """The kernels; a machine without a C compiler skips what needs them, by name."""
    found = kernels()
    if found is None:
        skip_without_compiler()
    assert found is not None
    return found


def skip_without_compiler() -> None:
    """Skip where there is no compiler, and only there: kernels that do not compile are a fault."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C compiler on this machine")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many torch threads as said, inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype)


def nans(dtype: torch.dtype, *shape: int) -> Tensor:
    """For outputs: what a kernel forgets to write shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def angles(positions: Tensor, size: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions [P], float32 [P, size / 2]."""
    turns = positions.unsqueeze(-1) * theta ** (-torch.arange(0, size, 2) / size)
    return turns.cos(), turns.sin()


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same numbers in float64: what the truth is computed from."""
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors)


def assert_within_the_rule(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Our error against float64 is at most twice that of plain torch at the same dtype."""
    assert ours.shape == plain.shape == truth.shape
    assert ours.dtype == plain.dtype
    error, plain_error = float((ours.double() - truth).norm()), float((plain.double() - truth).norm())
    assert error <= 2 * plain_error + 1e-7 * float(truth.norm()), (
        f"{error:.3e} against {plain_error:.3e} of {float(truth.norm()):.3e}"
    )


def assert_same_bits(results: Sequence[Tensor]) -> None:
    for other in results[1:]:
        assert torch.equal(results[0], other)
