"""Packed weights: they stand for what their GPTQ tensors stand for, and their product is that of the dequantised weight."""

import pytest
import torch

from finback.ops.gptq import dequantize_gptq, pack_bits
from finback.ops.packed import PackedWeight, pack_gptq, packed_linear, round_to_packed, stack_packed, unpacked

Gptq = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_gptq(rows: int, width: int, group: int, bits: int, symmetric: bool, seed: int = 0) -> Gptq:
    """qweight, qzeros, scales and g_idx of random integers, zero points and scales."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(1 << bits, (width, rows), generator=g)
    groups = width // group
    middle = 1 << (bits - 1)
    zeros = torch.full((groups, rows), middle) if symmetric else torch.randint(1, 1 << bits, (groups, rows), generator=g)
    scales = (torch.rand(groups, rows, generator=g) + 0.1).half()
    g_idx = torch.arange(width, dtype=torch.int32) // group
    return pack_bits(values, bits), pack_bits(zeros.T - 1, bits).T.contiguous(), scales, g_idx


def random_packed(rows: int, width: int, group: int, bits: int, symmetric: bool, seed: int = 0) -> PackedWeight:
    packed = pack_gptq(*random_gptq(rows, width, group, bits, symmetric, seed), bits)
    assert packed is not None
    return packed


# Rows that do and do not fill their blocks of 16, groups from one line up to the whole width.
FORMS = [(32, 64, 32), (8, 32, 8), (40, 96, 16), (16, 64, 64), (72, 128, 64), (200, 192, 96)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "width", "group"), FORMS)
def test_packed_weights_stand_for_the_dequantised_ones(rows: int, width: int, group: int, bits: int, symmetric: bool) -> None:
    parts = random_gptq(rows, width, group, bits, symmetric)
    packed = pack_gptq(*parts, bits)
    assert packed is not None
    assert packed.shape == (rows, width)
    assert (packed.shifts is None) == symmetric
    assert packed.group_size == group
    weight = dequantize_gptq(*parts, bits=bits)
    assert torch.equal(unpacked(packed), weight)
    x = torch.randn(3, width)
    assert torch.equal(packed_linear(x, packed), torch.nn.functional.linear(x, weight))


def test_memory_is_that_of_the_integers_and_their_scales() -> None:
    packed = random_packed(64, 256, 64, 4, True)
    assert packed.nbytes == 64 * 256 // 2 + 64 * 4 * 2


def test_what_has_no_place_in_the_form_is_refused() -> None:
    qweight, qzeros, scales, g_idx = random_gptq(32, 64, 32, 4, True)
    assert pack_gptq(qweight, qzeros, scales, g_idx.flip(0), 4) is None, "groups out of order"
    assert pack_gptq(qweight, qzeros, scales.float() + 1e-6, g_idx, 4) is None, "scales that are no float16"
    assert pack_gptq(*random_gptq(32, 64, 4, 4, True), 4) is None, "groups shorter than a line"
    assert pack_gptq(*random_gptq(32, 64, 32, 3, True), 3) is None, "three bits"


def test_experts_are_stacked() -> None:
    experts = [random_packed(32, 64, 32, 4, symmetric, seed) for seed, symmetric in enumerate((True, False, True))]
    stack = stack_packed(experts)
    assert stack is not None
    assert stack.shape == (3, 32, 64)
    assert torch.equal(unpacked(stack), torch.stack([unpacked(expert) for expert in experts]))
    assert stack_packed([random_packed(24, 64, 32, 4, True)] * 2) is None, "rows that do not fill their blocks"
    assert stack_packed([experts[0], random_packed(32, 64, 64, 4, True)]) is None, "groups of two sizes"


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_within_half_a_step(bits: int) -> None:
    weight = torch.randn(24, 64)
    weight[3] = 0
    packed = round_to_packed(weight, bits, 32)
    steps = weight.view(24, 2, 32).abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
    # A step is rounded to float16, by up to one part in 2048 of at most half the grid.
    error = (unpacked(packed) - weight).view(24, 2, 32).abs()
    assert (error <= steps * (0.5 + (1 << (bits - 1)) / 2048) + 1e-7).all()
    assert not unpacked(packed)[3].any()
