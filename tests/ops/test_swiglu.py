"""SwiGLU against the formula: values, gradients, precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.swiglu import swiglu
from tests.ops.rule import assert_close_in_float64, assert_low_precision_rule, assert_repeatable

pytestmark = pytest.mark.usefixtures("implementation")


def naive(gate: Tensor, up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    activation = F.silu(gate) * up
    return activation if row_weight is None else (activation * row_weight.unsqueeze(-1)).to(gate.dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16)])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_equals_the_formula(shape: tuple[int, ...], weighted: bool) -> None:
    inputs = [torch.randn(shape), torch.randn(shape), torch.randn(shape[:-1])][: 3 if weighted else 2]
    # The gradient of a row weight is summed in float32: gate values are float32.
    assert_close_in_float64(swiglu, naive, *inputs, tolerance=1e-6 if weighted else 1e-12)


def test_swiglu_passes_gradcheck() -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (3, 4), (3,))]
    assert torch.autograd.gradcheck(swiglu, inputs[:2])
    assert torch.autograd.gradcheck(swiglu, inputs)


def test_swiglu_written_out() -> None:
    """silu(x) = x / (1 + exp(-x)): silu(ln 3) = ln 3 * 3/4."""
    gate, up = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[4.0, 5.0]])
    torch.testing.assert_close(swiglu(gate, up, torch.tensor([2.0])), torch.tensor([[6 * 1.0986123, 0.0]]))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_in_bf16_keeps_the_error_rule(weighted: bool) -> None:
    gate, up, row_weight = torch.randn(60, 40).bfloat16(), torch.randn(60, 40).bfloat16(), torch.rand(60)
    assert_low_precision_rule(swiglu, naive, gate, up, *([row_weight] if weighted else []))


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_leaves_its_inputs_alone_and_is_the_same_without_gradients(weighted: bool) -> None:
    gate, up, row_weight = torch.randn(6, 8), torch.randn(6, 8), torch.rand(6) if weighted else None
    copies = gate.clone(), up.clone()
    expected = swiglu(gate.clone().requires_grad_(), up, row_weight)
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up, row_weight), expected)
    assert torch.equal(gate, copies[0])
    assert torch.equal(up, copies[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(swiglu, torch.randn(33, 20).to(dtype), torch.randn(33, 20).to(dtype), torch.rand(33))
