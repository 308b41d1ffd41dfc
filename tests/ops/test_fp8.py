"""FP8 casts: exact values against a plain loop, ragged edges, and what must survive a round trip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finback.ops.fp8 import dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128

FP8 = torch.float8_e4m3fn
SIZES = st.sampled_from([1, 2, 100, 127, 128, 129, 200, 256, 300])
SEEDS = st.integers(0, 2**32 - 1)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def plain_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    payload = torch.empty(rows, columns, dtype=FP8)
    scale_inv = torch.empty(math.ceil(rows / 128), math.ceil(columns / 128))
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            block = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            amax = weight[block].float().abs().max()
            scale_inv[i, j] = amax / 448 if amax > 0 else 1.0
            payload[block] = (weight[block].float() / scale_inv[i, j]).to(FP8)
    return payload, scale_inv


def plain_dequantize(payload: Tensor, scale_inv: Tensor) -> Tensor:
    weight = payload.float()
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale_inv[i, j]
    return weight


def random_payload(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Any codes but nan, with the largest code somewhere in each block, and scales as weights have them."""
    codes = torch.randint(0, 0x7F, (rows, columns), generator=generator, dtype=torch.uint8)
    codes += 0x80 * torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8)
    for top in range(0, rows, 128):
        for left in range(0, columns, 128):
            i = torch.randint(top, min(top + 128, rows), (), generator=generator)
            j = torch.randint(left, min(left + 128, columns), (), generator=generator)
            codes[i, j] = 0x7E + 0x80 * int(torch.randint(0, 2, (), generator=generator))
    grid = math.ceil(rows / 128), math.ceil(columns / 128)
    exponents = torch.randint(-40, 10, grid, generator=generator)
    scale_inv = torch.ldexp(1 + torch.rand(grid, generator=generator), exponents)
    return codes.view(FP8), scale_inv


@settings(max_examples=30)
@given(rows=SIZES, columns=SIZES, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_quantize_and_dequantize_equal_the_plain_loop(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    payload, scale_inv = quantize_128x128(weight)
    plain_payload, plain_scale_inv = plain_quantize(weight)
    assert torch.equal(bytes_of(payload), bytes_of(plain_payload))
    assert torch.equal(scale_inv, plain_scale_inv)
    exact = plain_dequantize(payload, scale_inv)
    assert torch.equal(dequantize_128x128(payload, scale_inv), exact)
    assert torch.equal(dequantize_128x128(payload, scale_inv, dtype), exact.to(dtype))
    # Half the distance between the two largest codes is 16 of 448.
    bound = scale_inv.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns] * 16.001
    assert ((exact - weight.float()).abs() <= bound).all()


def test_long_rows_are_cut_into_strips_of_whole_blocks() -> None:
    weight = torch.randn(300, 20_000)
    payload, scale_inv = quantize_128x128(weight)
    plain_payload, plain_scale_inv = plain_quantize(weight)
    assert torch.equal(bytes_of(payload), bytes_of(plain_payload))
    assert torch.equal(scale_inv, plain_scale_inv)
    assert torch.equal(dequantize_128x128(payload, scale_inv), plain_dequantize(payload, scale_inv))


def test_strided_weights_are_read_and_written_in_place() -> None:
    weight = torch.randn(200, 140)
    straight, transposed = quantize_128x128(weight.T.contiguous()), quantize_128x128(weight.T)
    assert torch.equal(bytes_of(straight[0]), bytes_of(transposed[0]))
    assert torch.equal(straight[1], transposed[1])
    stack = torch.full((3, 200, 140), 7.0, dtype=torch.bfloat16)
    payload, scale_inv = quantize_128x128(weight)
    dequantize_128x128(payload, scale_inv, out=stack[1])
    assert torch.equal(stack[1], dequantize_128x128(payload, scale_inv, torch.bfloat16))
    assert (stack[0] == 7).all()
    assert (stack[2] == 7).all()


def test_weights_that_require_gradients_are_cast() -> None:
    payload, scale_inv = quantize_128x128(torch.nn.Parameter(torch.randn(4, 4)))
    assert not payload.requires_grad
    assert not scale_inv.requires_grad


@settings(max_examples=60)
@given(rows=SIZES, columns=SIZES, seed=SEEDS)
def test_payload_that_reaches_the_largest_code_comes_back_unchanged(rows: int, columns: int, seed: int) -> None:
    payload, scale_inv = random_payload(rows, columns, torch.Generator().manual_seed(seed))
    again, scale_again = quantize_128x128(dequantize_128x128(payload, scale_inv))
    assert torch.equal(bytes_of(payload), bytes_of(again))  # signs of zeros included
    steps = scale_inv.view(torch.int32) - scale_again.view(torch.int32)
    assert steps.abs().max() <= 1
    third, scale_third = quantize_128x128(dequantize_128x128(again, scale_again))
    assert torch.equal(bytes_of(payload), bytes_of(third))
    assert torch.equal(scale_again, scale_third)


@settings(max_examples=200)
@given(mantissa=st.integers(0, 2**23 - 1), exponent=st.integers(-100, 100))
def test_scale_moves_at_most_one_float32_step_and_only_once(mantissa: int, exponent: int) -> None:
    scale = torch.tensor([[math.ldexp(1 + mantissa / 2**23, exponent)]])
    payload = torch.full((1, 1), 448.0).to(FP8)
    once = quantize_128x128(dequantize_128x128(payload, scale))[1]
    assert (scale.view(torch.int32) - once.view(torch.int32)).abs() <= 1
    assert torch.equal(quantize_128x128(dequantize_128x128(payload, once))[1], once)


@settings(max_examples=30)
@given(rows=SIZES, columns=SIZES, seed=SEEDS)
def test_bfloat16_between_keeps_payloads_and_moves_scales_once(rows: int, columns: int, seed: int) -> None:
    payload, scale_inv = random_payload(rows, columns, torch.Generator().manual_seed(seed))
    again, scale_again = quantize_128x128(dequantize_128x128(payload, scale_inv, torch.bfloat16))
    assert torch.equal(bytes_of(payload), bytes_of(again))
    assert ((scale_again / scale_inv - 1).abs() <= 1 / 256 + 1e-6).all()
    third, scale_third = quantize_128x128(dequantize_128x128(again, scale_again, torch.bfloat16))
    assert torch.equal(bytes_of(payload), bytes_of(third))
    assert torch.equal(scale_again, scale_third)


def test_power_of_two_scales_survive_bfloat16_exactly() -> None:
    payload, scale_inv = random_payload(300, 300, torch.Generator().manual_seed(3))
    scale_inv = torch.exp2(scale_inv.log2().ceil())
    again, scale_again = quantize_128x128(dequantize_128x128(payload, scale_inv, torch.bfloat16))
    assert torch.equal(bytes_of(payload), bytes_of(again))
    assert torch.equal(scale_again, scale_inv)


def test_requantising_is_idempotent_from_the_first_time_on() -> None:
    codes = torch.randint(0, 0x50, (200, 300), dtype=torch.uint8)  # no block reaches the largest code
    first = quantize_128x128(dequantize_128x128(codes.view(FP8), torch.rand(2, 3) + 0.1))
    second = quantize_128x128(dequantize_128x128(*first))
    assert torch.equal(bytes_of(first[0]), bytes_of(second[0]))
    assert torch.equal(first[1], second[1])


def test_zero_block_has_scale_one_and_stays_zero() -> None:
    weight = torch.zeros(130, 130)
    weight[129, 129] = -3.0
    payload, scale_inv = quantize_128x128(weight)
    assert scale_inv.tolist() == [[1.0, 1.0], [1.0, float(torch.tensor(3.0) / 448)]]
    assert torch.equal(dequantize_128x128(payload, scale_inv), weight)


def test_tiny_values_never_give_a_zero_or_subnormal_scale() -> None:
    weight = torch.tensor([[1e-44, -1e-40]])
    payload, scale_inv = quantize_128x128(weight)
    assert scale_inv.item() == torch.finfo(torch.float32).tiny
    value = dequantize_128x128(payload, scale_inv)
    assert torch.equal(quantize_128x128(value)[1], scale_inv)
    assert value.abs().max() <= 1e-40 * 1.07


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_show_in_the_scale_of_their_block_only(bad: float) -> None:
    weight = torch.ones(130, 1)
    weight[5] = bad
    _, scale_inv = quantize_128x128(weight)
    assert not scale_inv[0].isfinite()
    assert scale_inv[1] == 1 / torch.tensor(448.0)


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ValueError, match=r"needs a matrix \[M, N\], not a tensor of shape \[2, 3, 4\]"):
        quantize_128x128(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"scale_inv has shape \[1, 1\], a 129 x 5 payload needs \[2, 1\]"):
        dequantize_128x128(torch.ones(129, 5).to(FP8), torch.ones(1, 1))


@settings(max_examples=30)
@given(channels=SIZES, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_activations_equal_the_plain_loop(channels: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 3, channels, generator=generator) * 10).to(dtype)
    x[1] *= 1e-7  # below the bound on the largest magnitude
    payload, scale = quantize_1x128(x)
    assert payload.shape == x.shape
    assert scale.shape == (2, 3, math.ceil(channels / 128))
    for tile in range(scale.shape[-1]):
        part = x[..., tile * 128 : (tile + 1) * 128].float()
        expected = part.abs().amax(-1).clamp_min(1e-4) / 448
        assert torch.equal(scale[..., tile], expected)
        codes = payload[..., tile * 128 : (tile + 1) * 128]
        assert torch.equal(bytes_of(codes), bytes_of((part / expected[..., None]).to(FP8)))
        value = dequantize_1x128(payload, scale, dtype)[..., tile * 128 : (tile + 1) * 128]
        assert torch.equal(value, (codes.float() * expected[..., None]).to(dtype))
