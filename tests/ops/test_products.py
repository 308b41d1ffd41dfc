"""bfloat16 on a CPU without instructions for it: the same products, rounded once, and about as fast as float32."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finback.model.transformer import Transformer, init_weights
from finback.ops import products
from finback.ops.attention import causal_attention, latent_attention
from finback.ops.grouped import grouped_linear
from finback.ops.linear import add_sum_of_outer, linear, rows_times, sum_of_outer
from finback.ops.products import bmm, mm
from finback.presets import tiny
from finback.train.config import Precision
from finback.train.losses import accumulate_gradients

ROUNDED = 2**-8
"""Relative error of one rounding to bfloat16, the sum's own included."""
_THERE = products.cpu_multiplies_bfloat16()


@pytest.fixture(params=[False, True], autouse=True, ids=["widened", "by torch"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways on every processor."""
    there: bool = request.param
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: there)
    return there


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def _assert_rounded_once(ours: Tensor, truth: Tensor, error: float = ROUNDED) -> None:
    assert ours.dtype == torch.bfloat16
    assert ours.shape == truth.shape
    assert float((ours.double() - truth).norm()) <= error * float(truth.norm())


@pytest.mark.parametrize("rows", [1, 15, 16, 300])
def test_products_are_those_of_float64_rounded_once(rows: int) -> None:
    left, right, other = _random(rows, 40), _random(40, 24), _random(rows, 24)
    product, outer = left.double() @ right.double(), left.double().t() @ other.double()
    _assert_rounded_once(mm(left, right), product)
    _assert_rounded_once(bmm(left.expand(3, -1, -1), right.expand(3, -1, -1)), product.expand(3, -1, -1))
    _assert_rounded_once(rows_times(left, right), product)
    out = torch.full((rows, 24), float("nan"), dtype=torch.bfloat16)
    assert rows_times(left, right, out=out) is out
    _assert_rounded_once(out, product)
    _assert_rounded_once(sum_of_outer(left, other), outer)
    total = torch.zeros(40, 24)
    add_sum_of_outer(total, left, other)
    _assert_rounded_once(total.bfloat16(), outer)


def test_experts_and_attention_in_bfloat16() -> None:
    counts = torch.tensor([0, 40, 3, 21])
    x, weight = _random(64, 16), _random(4, 24, 16)
    expected = torch.cat([r @ w.T for r, w in zip(x.double().split(counts.tolist()), weight.double(), strict=True)])
    _assert_rounded_once(grouped_linear(x, weight, counts), expected)

    query, key, value = _random(2, 3, 50, 16), _random(2, 3, 50, 16), _random(2, 3, 50, 8)
    hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
    scores = (query.double() @ key.double().mT * 0.25).masked_fill(hidden, float("-inf"))
    # Where scores and weights are rounded to bfloat16, too, there are three roundings.
    _assert_rounded_once(causal_attention(query, key, value, 0.25), scores.softmax(-1) @ value.double(), 3 * ROUNDED)
    _assert_rounded_once(causal_attention(query, key, value, 0.25, ~hidden), scores.softmax(-1) @ value.double(), 3 * ROUNDED)

    latents = _random(2, 50, 20)
    query = _random(2, 30, 4, 20)
    weights = (torch.einsum("bthc,bsc->bths", query.double(), latents.double()) * 0.2).softmax(-1)
    expected = torch.einsum("bths,bsc->bthc", weights, latents[..., :16].double())
    _assert_rounded_once(latent_attention(query, latents, 16, 0.2), expected, 3 * ROUNDED)


@pytest.mark.parametrize("rows", [3, 64])
def test_a_linear_layer_under_autocast_has_the_gradients_of_its_rounded_operands(rows: int) -> None:
    x, weight, grad = torch.randn(2, rows, 32), torch.randn(16, 32), torch.randn(2, rows, 16)
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x, weight)
    out.backward(grad.bfloat16())
    low, matrix, slope = x.detach().bfloat16().double(), weight.detach().bfloat16().double(), grad.bfloat16().double()
    _assert_rounded_once(out.detach(), low @ matrix.T)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    _assert_rounded_once(x.grad.bfloat16(), slope @ matrix)
    _assert_rounded_once(weight.grad.bfloat16(), slope.flatten(0, 1).T @ low.flatten(0, 1))


def test_a_model_learns_the_same_in_bfloat16_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model's gradients are as near to those in float32."""
    preset = tiny()
    model = Transformer(preset.model, dtype=torch.float32)
    init_weights(model, seed=0)
    rows = torch.randint(preset.model.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))

    def gradient(precision: Precision) -> Tensor:
        model.zero_grad()
        accumulate_gradients(model, [rows], mtp_loss_coef=0.3, balance_loss_coef=1e-4, precision=precision, recompute="none")
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient("fp32")
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: True)
    by_torch = float((gradient("bf16") - exact).norm())
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: False)
    widened = float((gradient("bf16") - exact).norm())
    assert 0 < widened <= 1.5 * by_torch < 0.15 * float(exact.norm())


def test_bfloat16_is_not_many_times_slower_than_float32(instructions: bool) -> None:
    """A hundred times, it was, on processors with AVX2."""
    if instructions and not _THERE:
        pytest.skip("torch alone is slow on this processor")
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    low = left.bfloat16(), right.bfloat16()
    assert _seconds(lambda: mm(*low)) < 10 * _seconds(lambda: mm(left, right))


def _seconds(work: Callable[[], Tensor]) -> float:
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
