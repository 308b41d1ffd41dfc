"""GPTQ against a brute-force oracle and against rounding to nearest, and packing against words written by hand."""

import pytest
import torch
from torch import Tensor

from finback.config import InputError
from finback.ops.gptq import dequantize_gptq, pack_bits, unpack_bits
from finback.quant.gptq import gptq, relative_error
from finback.quant.rtn import dequantised, fit_grid, from_grid, round_to_nearest, to_grid


def _inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs: a mixture of few directions, of very different sizes, and a little noise."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, width // 4, generator=g) @ torch.randn(width // 4, width, generator=g)
    return mixed * torch.rand(width, generator=g).exp2() + 0.1 * torch.randn(rows, width, generator=g)


def _weight(outputs: int, width: int) -> Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize(
    ("bits", "column", "words"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
        (4, [15, 0, 0, 0, 0, 0, 0, 9, 8, 0, 0, 0, 0, 0, 0, 7], [0x9000000F, 0x70000008]),
        (8, [1, 2, 3, 255], [0xFF030201]),
        (8, [128, 0, 0, 1, 2, 0, 0, 3], [0x01000080, 0x03000002]),
        # Value 10 has bits 30 and 31 of the first word and bit 0 of the second, value 21 bit 31 of the second and two of the third.
        (3, [1] + [0] * 9 + [7] + [0] * 10 + [5] + [0] * 9 + [6], [0xC0000001, 0x80000001, 0xC0000002]),
        (3, [0] * 31 + [7] + [7] + [0] * 31, [0, 0, 0xE0000000, 7, 0, 0]),
    ],
)  # fmt: skip
def test_words_are_those_written_by_hand(bits: int, column: list[int], words: list[int]) -> None:
    values = torch.tensor(column).view(-1, 1).expand(-1, 3)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.int32
    assert [word % 2**32 for word in packed[:, 1].tolist()] == words
    assert torch.equal(unpack_bits(packed, bits), values.int())


def test_a_weight_is_value_less_zero_times_scale_of_its_channels_group() -> None:
    values = torch.tensor([[1, 15], [2, 0], [3, 7], [4, 8], [5, 1], [6, 2], [7, 3], [8, 4]])
    qzeros = torch.tensor([[7 | 3 << 4], [1 | 15 << 4]], dtype=torch.int32)  # zeros 8 and 4, then 2 and, wrapped, 0
    scales = torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float16)
    g_idx = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.int32)
    padded = torch.nn.functional.pad(qzeros, (0, 0))
    eight = torch.cat((values, values, values, values), 1)
    zeros = padded.expand(-1, 1).clone() | (padded << 8) | (padded << 16) | (padded << 24)
    weight = dequantize_gptq(pack_bits(eight, 4), zeros, scales.repeat(1, 4), g_idx, 4)
    assert weight[0].tolist() == [-3.5, -3.0, 2.0, 4.0, -1.5, -1.0, 10.0, 12.0]
    assert weight[1].tolist() == [11.0, -4.0, 1.75, 2.0, -3.0, -2.0, 0.75, 1.0]


def _oracle(weight: Tensor, hessian: Tensor, bits: int, size: int, sym: bool, damping: float = 0.01) -> Tensor:
    """Column by column in float64, with the inverse of what is left of the Hessian worked out anew each time."""
    left, h = weight.double().clone(), hessian.double().clone()
    h += torch.eye(len(h)) * damping * h.diagonal().mean()
    result = torch.empty(weight.shape, dtype=torch.int32)
    for i in range(weight.shape[1]):
        if i % size == 0:
            grid = fit_grid(left[:, i : i + size].float(), bits, sym)
        inverse = torch.linalg.inv(h[i:, i:])
        values = to_grid(left[:, i : i + 1].float(), grid, bits)
        error = left[:, i : i + 1] - from_grid(values, grid).double()
        left[:, i:] -= error / inverse[0, 0] * inverse[:1]
        result[:, i] = values[:, 0].int()
    return result


@pytest.mark.parametrize(
    ("width", "size", "sym"), [(24, 8, True), (160, 32, False), (150, 50, True), (288, 144, True), (40, 40, False)]
)
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_equals_the_oracle(width: int, size: int, sym: bool, bits: int) -> None:
    x, weight = _inputs(2 * width, width), _weight(6, width)
    hessian = x.T @ x
    squares = hessian.diagonal().tolist()
    groups = [list(range(start, start + size)) for start in range(0, width, size)]
    groups.sort(key=lambda columns: -max(squares[i] for i in columns))
    order = [i for columns in groups for i in sorted(columns, key=lambda i: -squares[i])]
    ours = gptq(weight, hessian, bits, size, sym)
    expected = _oracle(weight[:, order], hessian[order][:, order], bits, size, sym)
    assert (ours.values[:, order] == expected).float().mean() > 0.99  # a tie in float32 may fall otherwise
    assert ours.groups.tolist() == [i // size for i in range(width)]
    assert relative_error(weight, dequantised(ours), hessian) < 0.7 * relative_error(
        weight, dequantised(round_to_nearest(weight, bits, size, sym)), hessian
    )  # each group has its own scale


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_gptq_moves_outputs_less_than_rounding_to_nearest(bits: int, act_order: bool, sym: bool) -> None:
    x, weight = _inputs(600, 128), _weight(48, 128)
    hessian = x.T @ x
    ours = dequantised(gptq(weight, hessian, bits, 32, sym, act_order))
    nearest = dequantised(round_to_nearest(weight, bits, 32, sym))
    errors = [float((x @ (weight - w).T).norm() / (x @ weight.T).norm()) for w in (ours, nearest)]
    assert errors[0] < 0.7 * errors[1]
    assert relative_error(weight, ours, hessian) == pytest.approx(errors[0], rel=1e-3)


def test_act_order_forms_groups_by_falling_activation() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 17.0)
    quantised = gptq(_weight(4, 16), x.T @ x, 4, 8, act_order=True)
    assert quantised.groups.tolist() == [1] * 8 + [0] * 8


def test_inputs_that_no_token_has_are_rounded_to_nearest() -> None:
    x = _inputs(100, 16)
    x[:, 8:] = 0
    weight = _weight(4, 16)
    ours, nearest = gptq(weight, x.T @ x, 4, 8), round_to_nearest(weight, 4, 8, True)
    assert torch.equal(ours.values[:, 8:], nearest.values[:, 8:])
    assert not torch.equal(ours.values[:, :8], nearest.values[:, :8])


@pytest.mark.parametrize("weight", [torch.zeros(2, 8), torch.rand(2, 8), -torch.rand(2, 8), torch.full((2, 8), 1e-9)])
@pytest.mark.parametrize("sym", [False, True])
def test_odd_groups_keep_zero_points_that_every_reader_understands(weight: Tensor, sym: bool) -> None:
    quantised = round_to_nearest(weight, 4, 8, sym)
    assert 1 <= int(quantised.zeros.min()) <= int(quantised.zeros.max()) <= 15
    assert (quantised.scales > 0).all()
    assert (dequantised(quantised) - weight).abs().max() <= quantised.scales.max() * 1.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_a_weight_beyond_any_scale_is_told(bad: float) -> None:
    with pytest.raises(InputError, match="beyond the range"):
        round_to_nearest(torch.full((2, 8), bad), 4, 8, True)


def test_a_damaged_hessian_is_told() -> None:
    with pytest.raises(InputError, match="not positive definite"):
        gptq(_weight(2, 8), -torch.eye(8) + 2 * torch.ones(8, 8), 4, 8)
