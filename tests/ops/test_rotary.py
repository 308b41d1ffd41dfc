"""Rotary embedding: interleaved pairs, relative positions, precision."""

import math
from dataclasses import replace

import pytest
import torch

from finback.config import ModelConfig
from finback.ops.rotary import apply_rotary, inverse_frequencies, rotary_table

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    n_routed_experts=2, num_experts_per_tok=1, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=8, v_head_dim=4,
    max_position_embeddings=4096,
)  # fmt: skip


def test_pairs_are_interleaved() -> None:
    """Facts 1.5: (x0, x1), (x2, x3), ... are rotated, as complex numbers by exp(i t theta^(-2 i / R)), and stay where they are."""
    positions, x = torch.tensor([0, 1, 17]), torch.randn(3, 8)
    rotated = apply_rotary(x, *rotary_table(CONFIG, positions))
    frequencies = [10000 ** (-2 * i / 8) for i in range(4)]
    for row, position in enumerate(positions.tolist()):
        for pair, frequency in enumerate(frequencies):
            number = complex(*x[row, 2 * pair : 2 * pair + 2].tolist())
            angle = position * frequency
            expected = number * complex(math.cos(angle), math.sin(angle))
            assert complex(*rotated[row, 2 * pair : 2 * pair + 2].tolist()) == pytest.approx(expected, abs=1e-5)


def test_products_depend_on_the_distance_only() -> None:
    query, key = torch.randn(8), torch.randn(8)
    products = []
    for start in (0, 5, 900):
        cos, sin = rotary_table(CONFIG, torch.tensor([start + 7, start]))
        products.append(apply_rotary(query, cos[0], sin[0]) @ apply_rotary(key, cos[1], sin[1]))
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products[2], products[0], rtol=1e-3, atol=1e-3)


def test_rotation_is_float32_inside_and_keeps_the_dtype() -> None:
    x = torch.randn(5, 8).bfloat16()
    table = rotary_table(CONFIG, torch.arange(5))
    rotated = apply_rotary(x, *table)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rotary(x.float(), *table).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_rotary(x.float(), *table), apply_rotary(x.float(), *rotary_table(CONFIG, torch.arange(5))))


def test_far_positions_keep_their_angle() -> None:
    """Positions go through float32, exact up to 2^24: the angle at 163839 is right to about its own rounding."""
    cos, _ = rotary_table(CONFIG, torch.tensor([163839]))
    expected = [math.cos(163839 * float(f)) for f in inverse_frequencies(CONFIG).double()]
    assert cos.flatten().tolist() == pytest.approx(expected, abs=163839 * 2**-24)


def test_frequencies_without_yarn() -> None:
    frequencies = inverse_frequencies(replace(CONFIG, rope_theta=16.0))
    assert frequencies.tolist() == pytest.approx([1.0, 0.5, 0.25, 0.125])
