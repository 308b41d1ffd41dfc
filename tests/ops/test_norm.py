"""RMSNorm against the formula: values, gradients, precision."""

import pytest
import torch
from torch import Tensor

from finback.ops.norm import inverse_rms, rms_norm
from tests.ops.rule import assert_low_precision_rule, assert_repeatable, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("implementation")


def naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers writes it: statistics in float32 or better, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normalised.to(x.dtype)).to(x.dtype)


@pytest.mark.parametrize("eps", [1e-6, 0.05])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (2, 3, 4, 9)])
def test_rms_norm_equals_the_formula(shape: tuple[int, ...], eps: float) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    ours = outputs_and_gradients(lambda *inputs: rms_norm(*inputs, eps), (x, weight))
    exact = outputs_and_gradients(lambda *inputs: naive(*inputs, eps), (x.double(), weight.double()))
    for index, (one, other) in enumerate(zip(ours, exact, strict=True)):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6, msg=f"tensor {index}")


def test_rms_norm_passes_gradcheck() -> None:
    x, weight = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, 0.1), (x, weight))


def test_rms_norm_written_out() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    out = rms_norm(x, torch.tensor([2.0, 10.0]), 0.5)  # mean of squares 12.5, plus 0.5 is 13
    torch.testing.assert_close(out, torch.tensor([[6 / 13**0.5, 40 / 13**0.5], [0.0, 0.0]]))
    torch.testing.assert_close(inverse_rms(x, 0.5), torch.tensor([[13**-0.5], [0.5**-0.5]]))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_in_bf16_keeps_the_error_rule(weight_dtype: torch.dtype) -> None:
    """With bfloat16 weights, and with the float32 master weights of mixed precision."""
    x, weight = torch.randn(40, 96).bfloat16(), (1 + torch.randn(96) / 4).to(weight_dtype)
    assert rms_norm(x, weight, 1e-6).dtype == torch.bfloat16
    assert_low_precision_rule(lambda *inputs: rms_norm(*inputs, 1e-6), lambda *inputs: naive(*inputs, 1e-6), x, weight)


def test_statistics_are_float32_for_bf16_inputs() -> None:
    """4096 equal squares: a bfloat16 sum would stop growing at 256."""
    x = torch.full((1, 4096), 3.0).bfloat16()
    assert inverse_rms(x, 0.0).item() == pytest.approx(1 / 3, rel=1e-5)
    assert inverse_rms(x, 0.0).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_rms_norm_of_extreme_rows_is_finite(size: float) -> None:
    for tensor in outputs_and_gradients(lambda *inputs: rms_norm(*inputs, 1e-6), (size * torch.randn(3, 8), torch.ones(8))):
        assert tensor.isfinite().all()


def test_rms_norm_is_the_same_without_gradients_and_under_autocast() -> None:
    x, weight = torch.randn(5, 16), torch.randn(16)
    expected = rms_norm(x.clone().requires_grad_(), weight, 1e-6)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-6), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(lambda *inputs: rms_norm(*inputs, 1e-6), torch.randn(70, 48).to(dtype), torch.randn(48).to(dtype))
