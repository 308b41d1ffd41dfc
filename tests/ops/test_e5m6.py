"""The 12-bit format: every code, rounding against float16's own arithmetic, and packing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.ops.e5m6 import dequantize_e5m6, from_e5m6, pack_e5m6, quantize_e5m6, to_e5m6, unpack_e5m6


def all_codes() -> torch.Tensor:
    """Every finite code: the exponent of all ones is not used."""
    codes = torch.arange(1 << 12, dtype=torch.int16)
    return codes[((codes >> 6) & 0x1F) != 0x1F]


def value_of(code: int) -> float:
    """The format's definition."""
    sign, exponent, mantissa = -1.0 if code >> 11 else 1.0, (code >> 6) & 0x1F, code & 0x3F
    return sign * (2.0**-14 * mantissa / 64 if exponent == 0 else 2.0 ** (exponent - 15) * (1 + mantissa / 64))


def test_each_code_has_the_value_of_its_definition_and_comes_back() -> None:
    codes = all_codes()
    values = from_e5m6(codes)
    assert values.tolist() == [value_of(code) for code in codes.tolist()]
    back = to_e5m6(values)
    assert torch.equal(back[values != 0], codes[values != 0])


@settings(max_examples=200)
@given(st.floats(-70000, 70000, width=32))
def test_a_value_becomes_the_nearest_code_and_ties_go_to_even(value: float) -> None:
    codes = all_codes()
    table = from_e5m6(codes).double()
    got = to_e5m6(torch.tensor([value]))
    distance = (table - value).abs()
    assert (from_e5m6(got).double() - value).abs() == distance.min()
    nearest = codes[distance == distance.min()]
    if len({value_of(code) for code in nearest.tolist()}) == 2:
        assert int(got) % 2 == 0


def test_halfway_between_two_codes_is_even_without_rounding_twice() -> None:
    tie = 1 + 1 / 128  # between mantissas 0 and 1
    above = tie + 2**-20  # float16 would round it back to the tie first
    assert from_e5m6(to_e5m6(torch.tensor([tie, above, tie + 1 / 64]))).tolist() == [1.0, 1 + 1 / 64, 1 + 2 / 64]


def test_two_codes_share_three_bytes() -> None:
    codes = torch.randint(0, 1 << 12, (3, 10), dtype=torch.int16)
    packed = pack_e5m6(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 15)
    assert torch.equal(unpack_e5m6(packed), codes)
    assert pack_e5m6(torch.tensor([0x123, 0xABC], dtype=torch.int16)).tolist() == [0x23, 0xBC, 0xA1]


def test_activations_come_back_within_half_a_step_at_1_5_bytes_a_value() -> None:
    x = torch.randn(5, 300) * torch.logspace(-4, 3, 5).unsqueeze(1)
    packed, scale = quantize_e5m6(x)
    assert packed.numel() == x.numel() * 3 // 2
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)), "scales are powers of two"
    error = (dequantize_e5m6(packed, scale) - x).abs()
    assert bool((error <= x.abs() / 128 + 1e-30).all())
    again = quantize_e5m6(dequantize_e5m6(packed, scale))
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scale)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="packs values in pairs, but the rows have 3"):
        quantize_e5m6(torch.zeros(2, 3))
