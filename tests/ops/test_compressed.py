"""Compressed rows: bytes against a plain loop and published sizes, error bounds per value, and values that are not numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.ops.compressed import CodeFormat, CompressedRows, compressed_rows
from finback.ops.fp8 import dequantize_1x128, quantize_1x128
from tests.model.oracle import BASE, LLAMA

FORMATS: list[CodeFormat] = ["int8", "fp8"]


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_at_known_dimensions(format: CodeFormat) -> None:
    v3 = compressed_rows(replace(BASE, kv_lora_rank=512, qk_rope_head_dim=64), format)
    assert (v3.row_bytes, v3.tile) == (656, 128)
    smollm2 = compressed_rows(replace(LLAMA, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64), format)
    assert (smollm2.row_bytes, smollm2.tile) == (408, 64)
    assert smollm2.row_bytes <= 0.55 * 2 * 384
    narrow = compressed_rows(replace(LLAMA, hidden_size=192, num_attention_heads=6, num_key_value_heads=6, head_dim=32), format)
    assert narrow.tile == 64, "two heads of 32 share a scale"


def test_int8_bytes_equal_a_plain_loop() -> None:
    layout = CompressedRows("int8", 4, 2, 1)
    stored = layout.encode(torch.tensor([[0.5, -2.0, 0.0, 0.0, 1.5]]))
    assert stored.shape == (1, layout.row_bytes)
    assert stored[0, :4].view(torch.int8).tolist() == [32, -127, 0, 0]  # 31.75 and -127
    scales = stored[0, 4:12].clone().view(torch.float32)
    assert scales[0] == torch.tensor(2.0) / 127
    assert layout.decode(stored, torch.float32)[0].tolist() == pytest.approx([64 / 127, -2, 0, 0, 1.5])


def test_fp8_is_the_cast_of_activations() -> None:
    rows = torch.randn(5, 7, 320, generator=torch.Generator().manual_seed(0))
    layout = CompressedRows("fp8", 256, 128, 64)
    decoded = layout.decode(layout.encode(rows), torch.float32)
    assert torch.equal(decoded[..., :256], dequantize_1x128(*quantize_1x128(rows[..., :256])))
    assert torch.equal(decoded[..., 256:], rows[..., 256:].bfloat16().float())


@settings(max_examples=40, deadline=None)
@given(
    tiles=st.integers(1, 3), tile=st.sampled_from([1, 3, 32, 128]), kept=st.sampled_from([0, 1, 8]), seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30), format=st.sampled_from(FORMATS),
)  # fmt: skip
def test_the_error_is_bounded_by_the_largest_of_the_tile(
    tiles: int, tile: int, kept: int, seed: int, exponent: int, format: CodeFormat
) -> None:
    layout = CompressedRows(format, tiles * tile, tile, kept)
    rows = torch.randn(3, tiles * tile + kept, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    decoded = layout.decode(layout.encode(rows), torch.float32)
    values = rows[:, : tiles * tile].unflatten(-1, (-1, tile))
    error = (decoded[:, : tiles * tile].unflatten(-1, (-1, tile)) - values).abs()
    largest = values.abs().amax(-1, keepdim=True)
    bound = largest / 254 if format == "int8" else torch.maximum(values.abs() / 16, largest / 448 / 1024)
    assert (error <= bound * 1.0001).all()
    assert torch.equal(decoded[:, tiles * tile :], rows[:, tiles * tile :].bfloat16().float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_a_number_spoils_its_own_tile_only(format: CodeFormat, bad: float) -> None:
    layout = CompressedRows(format, 8, 4, 0)
    rows = torch.ones(2, 8)
    rows[0, 1] = bad
    decoded = layout.decode(layout.encode(rows), torch.float32)
    assert not decoded[0, 1].isfinite()
    assert decoded[0, 4:].isfinite().all()
    assert decoded[1].tolist() == pytest.approx([1.0] * 8)
