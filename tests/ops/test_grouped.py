"""Dispatch and the grouped expert product: no pair is lost, and every fast path equals the loop over experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finback.ops import grouped
from finback.ops.grouped import (
    Dispatch,
    dispatch_order,
    grouped_linear,
    grouped_linear_loop,
    permute,
    row_alignment,
    unpermute,
)
from tests.ops.rule import assert_close_in_float64, assert_low_precision_rule, assert_repeatable, outputs_and_gradients


@pytest.fixture(params=["C", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply, on processors where the first is the faster one."""
    if request.param == "torch":
        monkeypatch.setattr(grouped, "_native", lambda *_: None)


def choices(tokens: int, top_k: int, n_experts: int, skew: float, seed: int) -> Tensor:
    """[tokens, top_k] distinct experts per token; the larger the skew, the more tokens want the same ones."""
    generator = torch.Generator().manual_seed(seed)
    wish = torch.rand(tokens, n_experts, generator=generator) + skew * torch.rand(n_experts, generator=generator)
    return wish.topk(top_k, sorted=False).indices


@settings(max_examples=150)
@given(
    tokens=st.integers(1, 60),
    top_k=st.integers(1, 6),
    n_experts=st.integers(6, 40),
    skew=st.sampled_from([0.0, 1.0, 100.0]),
    alignment=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_dispatch_keeps_every_pair_whatever_the_imbalance(
    tokens: int, top_k: int, n_experts: int, skew: float, alignment: int, seed: int
) -> None:
    """Facts 1.6: no token is dropped, in training or inference."""
    indices = choices(tokens, top_k, n_experts, skew, seed)
    dispatch = dispatch_order(indices, n_experts, alignment)
    check_dispatch(dispatch, indices, n_experts, alignment)


@pytest.mark.parametrize("alignment", [1, 2, 7, 64])
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_dispatch_of_all_tokens_to_one_expert(expert: int, alignment: int) -> None:
    indices = torch.full((130, 1), expert)
    dispatch = dispatch_order(indices, 8, alignment)
    check_dispatch(dispatch, indices, 8, alignment)
    assert dispatch.rows.tolist() == [-(-130 // alignment) * alignment if e == expert else 0 for e in range(8)]


def check_dispatch(dispatch: Dispatch, indices: Tensor, n_experts: int, alignment: int) -> None:
    tokens, top_k = indices.shape
    order, real = dispatch.order.tolist(), dispatch.real
    is_real = [True] * len(order) if real is None else [bool(value) for value in real.tolist()]
    assert sorted(pair for pair, keep in zip(order, is_real, strict=True) if keep) == list(range(tokens * top_k))
    assert dispatch.token.tolist() == [pair // top_k for pair in order]
    assert [order[row] for row in dispatch.inverse.tolist()] == list(range(tokens * top_k))
    assert all(is_real[row] for row in dispatch.inverse.tolist())
    rows = dispatch.rows.tolist()
    assert sum(rows) == len(order)
    assert len(rows) == n_experts
    flat, start = indices.flatten().tolist(), 0
    for expert, count in enumerate(rows):
        pairs = [order[row] for row in range(start, start + count) if is_real[row]]
        assert pairs == [pair for pair, chosen in enumerate(flat) if chosen == expert]  # all of them, tokens in order
        assert count == -(-len(pairs) // alignment) * alignment
        start += count


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize(("tokens", "top_k", "n_experts"), [(1, 1, 1), (13, 3, 8), (40, 2, 64), (30, 5, 5)])
def test_permute_and_unpermute_equal_the_loop_over_pairs(tokens: int, top_k: int, n_experts: int, alignment: int) -> None:
    indices = choices(tokens, top_k, n_experts, 1.0, 0)
    dispatch = dispatch_order(indices, n_experts, alignment)
    real = torch.ones(len(dispatch.order)) if dispatch.real is None else dispatch.real
    scale = torch.randn(n_experts, dtype=torch.float64)
    of_row = scale.repeat_interleave(dispatch.rows)

    def ours(x: Tensor, values: Tensor) -> Tensor:
        rows = permute(x, dispatch) * (of_row * real * values.flatten()[dispatch.order]).unsqueeze(1)
        return unpermute(rows, dispatch, tokens)

    def loop(x: Tensor, values: Tensor) -> Tensor:
        return torch.stack(
            [sum(values[t, k] * scale[indices[t, k]] * x[t] for k in range(top_k)) for t in range(tokens)]  # type: ignore[misc]
        )

    assert_close_in_float64(ours, loop, torch.randn(tokens, 4), torch.randn(tokens, top_k))


def test_permute_and_unpermute_pass_gradcheck() -> None:
    dispatch = dispatch_order(choices(5, 2, 4, 0.0, 0), 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tensor: permute(tensor, dispatch), x)
    assert torch.autograd.gradcheck(lambda tensor: unpermute(tensor, dispatch, 5), y)


# Row counts per expert: even, with empty groups at both ends and in a row, everything in one.
COUNTS = [[5, 5, 5, 5], [0, 9, 0, 0, 4, 1, 0], [0, 0, 33, 0], [17], [1, 0, 2], [64, 128, 0, 64]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 8), (8, 24), (7, 5), (16, 3), (1, 1)])
def test_grouped_linear_equals_the_loop_over_experts(counts: list[int], inputs: int, outputs: int, products: None) -> None:
    """Widths that torch's grouped kernel takes, and odd ones that it does not."""
    x, weight = torch.randn(sum(counts), inputs), torch.randn(len(counts), outputs, inputs)
    ours = outputs_and_gradients(grouped_linear, (x, weight, torch.tensor(counts)))
    loop = outputs_and_gradients(grouped_linear_loop, (x.double(), weight.double(), torch.tensor(counts)))
    for one, other in zip(ours, loop, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)
    for expert, count in enumerate(counts):
        assert count > 0 or not ours[2][expert].any()


def test_grouped_linear_passes_gradcheck(products: None) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: grouped_linear(*tensors, torch.tensor([2, 0, 4])), (x, weight))


def test_grouped_linear_takes_views(products: None) -> None:
    """Rows cut out of a wider matrix, transposed ones, and a gradient that is one number repeated."""
    wide, weight, counts = torch.randn(12, 32), torch.randn(3, 8, 16), torch.tensor([5, 0, 7])
    for x in (wide[:, :16], wide[:, 3:19], torch.randn(16, 12).T):
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(grouped_linear(x, weight, counts), grouped_linear_loop(x, weight, counts))
        grouped_linear(leaf, weight, counts).sum().backward()
        rows = torch.arange(3).repeat_interleave(counts)
        torch.testing.assert_close(leaf.grad, weight.sum(1)[rows])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (13, 7)])
def test_grouped_linear_in_bf16_keeps_the_error_rule(counts: list[int], inputs: int, outputs: int, products: None) -> None:
    x, weight = torch.randn(sum(counts), inputs).bfloat16(), torch.randn(len(counts), outputs, inputs).bfloat16()
    assert_low_precision_rule(grouped_linear, grouped_linear_loop, x, weight, torch.tensor(counts))


def test_sums_over_pairs_in_bf16_keep_the_error_rule() -> None:
    dispatch = dispatch_order(choices(50, 6, 8, 1.0, 0), 8, 4)
    token = dispatch.token[dispatch.inverse]

    def ours(pairs: Tensor) -> Tensor:  # filling rows get a gradient that nothing may use: they are left out
        rows = pairs.new_zeros(len(dispatch.order), 24).index_copy(0, dispatch.inverse, pairs)
        return unpermute(rows, dispatch, 50)

    def plain(pairs: Tensor) -> Tensor:
        return pairs.new_zeros(50, 24).index_add(0, token, pairs)

    assert_low_precision_rule(ours, plain, torch.randn(300, 24).bfloat16())
    x = torch.randn(50, 24).bfloat16()
    assert_low_precision_rule(lambda y: permute(y, dispatch)[dispatch.inverse], lambda y: y[token], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 9])
def test_grouped_ops_are_repeatable(width: int, dtype: torch.dtype, products: None) -> None:
    """Empty groups among them: their gradient must be written, not left as memory was."""
    counts = torch.tensor([0, 30, 1, 0, 64, 0])
    x, weight = torch.randn(95, width).to(dtype), torch.randn(6, 16, width).to(dtype)
    assert_repeatable(grouped_linear, x, weight, counts)
    dispatch = dispatch_order(choices(19, 5, 8, 1.0, 0), 8, 8)
    assert_repeatable(lambda tensor: unpermute(permute(tensor, dispatch), dispatch, 19), x[:19].contiguous())


@pytest.mark.parametrize("float32_too", [False, True])
def test_row_alignment_pays_only_where_onednn_multiplies(float32_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "onednn_is_faster", lambda: float32_too)
    monkeypatch.setattr(grouped, "_native", lambda *_: None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for rows in (1, 100, 5000, 10**6):
        assert row_alignment(rows, 8, torch.float64, cpu) == row_alignment(rows, 8, torch.bfloat16, cuda) == 1
        alignment = row_alignment(rows, 8, torch.bfloat16, cpu)
        assert alignment & (alignment - 1) == 0
        assert 1 <= alignment <= max(1, min(64, rows // 8 // 8))
        assert row_alignment(rows, 8, torch.float32, cpu) == (alignment if float32_too else 1)
    assert row_alignment(10**6, 8, torch.bfloat16, cpu) == 64
