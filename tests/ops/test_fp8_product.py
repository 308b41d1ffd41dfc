"""The FP8 product against its definition in float64, its fast twin, and the accumulator that it works around."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.ops.fp8 import FP8, dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128
from finback.ops.fp8_product import dequantized_gemm, fp8_gemm, tensor_core_product

SIZES = st.sampled_from([1, 3, 64, 127, 128, 129, 200, 384])


@settings(max_examples=25)
@given(rows=SIZES, columns=SIZES, depth=SIZES, seed=st.integers(0, 2**31))
def test_it_is_the_product_of_what_the_payloads_stand_for(rows: int, columns: int, depth: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = quantize_1x128(torch.randn(rows, depth, generator=generator))
    weight = quantize_128x128(torch.randn(columns, depth, generator=generator))
    other = quantize_1x128(torch.randn(columns, depth, generator=generator))
    left = dequantize_1x128(*a).double()
    for b, right in ((weight, dequantize_128x128(*weight)), (other, dequantize_1x128(*other))):
        exact = left @ right.double().T
        bound = 1e-6 * (left.abs() @ right.double().abs().T)
        for product in (fp8_gemm, dequantized_gemm):
            result = product(*a, *b)
            assert result.dtype == torch.float32
            assert bool(((result - exact).abs() <= bound).all())
        assert fp8_gemm(*a, *b, torch.bfloat16).dtype == torch.bfloat16


def test_partial_sums_are_promoted_tile_by_tile() -> None:
    """Bitwise: float32 sums of 128 products each, scaled, and added in order."""
    a, b = quantize_1x128(torch.randn(5, 300)), quantize_128x128(torch.randn(7, 300))
    total = torch.zeros(5, 7)
    for tile, part in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        partial = a[0][:, part].float() @ b[0][:, part].float().T
        total += partial * a[1][:, tile : tile + 1] * b[1][0, tile]
    assert torch.equal(fp8_gemm(*a, *b), total)


def test_an_empty_sum_is_zero() -> None:
    a, b = quantize_1x128(torch.empty(3, 0)), quantize_1x128(torch.empty(2, 0))
    for product in (fp8_gemm, dequantized_gemm):
        assert torch.equal(product(*a, *b), torch.zeros(3, 2))


def test_scales_that_do_not_fit_are_named() -> None:
    a, b = quantize_1x128(torch.randn(5, 300)), quantize_128x128(torch.randn(200, 300))
    with pytest.raises(ValueError, match=r"scales \[5, 2\]; it needs|it needs a \[M, K\]"):
        fp8_gemm(a[0], a[1][:, :2], *b)
    with pytest.raises(
        ValueError, match=r"scales \[1, 3\] for b \[200, 300\]; it needs \[2, 3\] of blocks or \[200, 3\] of rows"
    ):
        fp8_gemm(*a, b[0], b[1][:1])


def largest_error(depth: int, promote_every: int | None) -> float:
    generator = torch.Generator().manual_seed(depth)
    a, b = (torch.rand(16, depth, generator=generator).to(FP8).float() for _ in range(2))
    exact = a.double() @ b.double().T
    return float(((tensor_core_product(a, b, promote_every=promote_every) - exact).abs() / exact).max())


def test_the_accumulator_alone_loses_percents_and_promotion_keeps_them() -> None:
    errors = [largest_error(depth, None) for depth in (1024, 2048, 4096, 8192)]
    assert errors == sorted(errors)
    assert 0.005 <= errors[2] <= 0.05
    assert largest_error(4096, 128) <= errors[2] / 10


def test_the_accumulator_model_is_exact_where_it_has_the_bits() -> None:
    """Whole numbers whose sums stay below 2^13."""
    a, b = torch.randint(0, 4, (3, 256)).float(), torch.randint(0, 4, (2, 256)).float()
    assert torch.equal(tensor_core_product(a, b), a.double() @ b.double().T)
    assert float(tensor_core_product(torch.tensor([[1.0] * 32 + [2.0**-13]]), torch.ones(1, 33))) == 32


def test_the_public_functions_are_where_the_design_puts_them() -> None:
    import finback.ops

    assert finback.ops.fp8_gemm is fp8_gemm
    assert finback.ops.quantize_1x128 is quantize_1x128
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        finback.ops.quantise  # noqa: B018
