"""Products with packed weights in C against their twin in torch, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.arguments import Choice, Norm, Weights
from finback.ops.packed import PackedWeight, stack_packed, unpacked
from finback.ops.swiglu import swiglu
from tests.ops.native.rule import DTYPES, assert_same_bits, assert_within_the_rule, compiled, draw, nans, threads, wide
from tests.ops.test_packed import random_packed

EPS = 1e-6
FORMS = [(8, 4), (40, 4), (96, 4), (4, 8), (20, 8), (96, 8)]  # group size, bits


def weights_of(rows: tuple[int, ...], width: int, group: int, bits: int, symmetric: bool) -> list[PackedWeight]:
    return [random_packed(count, width, group, bits, symmetric, seed) for seed, count in enumerate(rows)]


def assert_products(x: Tensor, weights: list[PackedWeight], outputs: list[Tensor]) -> None:
    """By the rule: the weights that torch multiplies with are rounded to the dtype of x, ours never are."""
    plain = [F.linear(x, unpacked(weight).to(x.dtype)) for weight in weights]
    truth = [F.linear(x.double(), unpacked(weight).double()) for weight in weights]
    assert_within_the_rule(*(torch.cat([t.flatten() for t in tensors]) for tensors in (outputs, plain, truth)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "bits"), FORMS)
def test_linear_multiplies_packed_weights(group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    rows, width = ((72, 16, 40) if bits == 4 else (68, 16, 20)), 480
    weights = weights_of(rows, width, group, bits, symmetric)
    for tokens in (1, 2, 3, 5, 8, 9, 12, 13, 33):
        x = draw(dtype, tokens, width)
        outputs = [nans(dtype, tokens, count) for count in rows]
        compiled().linear(x, weights, outputs)()
        assert_products(x, weights, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_bias_residual_and_a_plain_neighbour(dtype: torch.dtype) -> None:
    packed, plain = random_packed(40, 64, 32, 4, False), draw(dtype, 24, 64, scale=0.1)
    for tokens in (1, 6, 20):
        x, norm, residual, bias = draw(dtype, tokens, 64), draw(dtype, 64), draw(dtype, tokens, 40), draw(dtype, 40)
        outputs = [nans(dtype, tokens, 40), nans(dtype, tokens, 24)]
        compiled().linear(x, [packed, plain], outputs, Norm(norm, EPS), residual, [bias, None])()

        def expected(weight: Tensor, *tensors: Tensor) -> Tensor:
            x, norm, residual, bias, plain = tensors
            x = F.rms_norm(x, x.shape[-1:], norm, EPS)
            return torch.cat((F.linear(x, weight, bias) + residual, F.linear(x, plain)), 1)

        tensors = (x, norm, residual, bias, plain)
        truth = expected(unpacked(packed).double(), *wide(*tensors))
        assert_within_the_rule(torch.cat(outputs, 1), expected(unpacked(packed).to(dtype), *tensors), truth)


def test_logits_are_not_rounded() -> None:
    head, x = random_packed(72, 64, 32, 8, True), draw(torch.bfloat16, 3, 64)
    logits = torch.empty(3, 72)
    compiled().linear(x, [head], [logits])()
    torch.testing.assert_close(logits, F.linear(x.float(), unpacked(head)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_feed_forward(dtype: torch.dtype) -> None:
    gate, up = weights_of((96, 96), 64, 32, 4, False)
    down = random_packed(64, 96, 32, 4, True, seed=5)
    for tokens in (1, 2, 7, 40):
        x = draw(dtype, tokens, 64, scale=0.05)
        output = nans(dtype, tokens, 64)
        compiled().feed_forward(x, output, residual=x, shared=Weights(gate, up, down))()

        def expected(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return x + F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)

        plain = [unpacked(weight) for weight in (gate, up, down)]
        truth = expected(*wide(x, *plain))
        assert_within_the_rule(output, expected(x, *(weight.to(dtype) for weight in plain)), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_routed_experts(dtype: torch.dtype) -> None:
    def stack(rows: int, width: int, seed: int) -> PackedWeight:
        stacked = stack_packed([random_packed(rows, width, 32, 4, True, seed + expert) for expert in range(4)])
        assert stacked is not None
        return stacked

    gate, up, down = stack(32, 64, 0), stack(32, 64, 4), stack(64, 32, 8)
    for tokens in (1, 3, 30):
        x = draw(dtype, tokens, 64, scale=0.05)
        indices = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
        values = torch.rand(tokens, 2)
        output = nans(dtype, tokens, 64)
        compiled().feed_forward(x, output, choice=Choice(indices, values), experts=Weights(gate, up, down))()

        def expected(x: Tensor, values: Tensor, gate: Tensor, up: Tensor, down: Tensor, indices: Tensor) -> Tensor:
            rows = []
            for row, chosen, weight in zip(x, indices, values, strict=True):
                hidden = [swiglu(gate[e] @ row, up[e] @ row) * w for e, w in zip(chosen, weight.to(x.dtype), strict=True)]
                rows.append(torch.stack([down[e] @ h for e, h in zip(chosen, hidden, strict=True)]).sum(0))
            return torch.stack(rows)

        plain = [unpacked(weight) for weight in (gate, up, down)]
        truth = expected(*wide(x, values, *plain), indices=indices)
        assert_within_the_rule(output, expected(x, values, *(weight.to(dtype) for weight in plain), indices=indices), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    weights = weights_of((72, 24), 64, 32, 4, False)
    for tokens in (1, 14):
        x = draw(dtype, tokens, 64)
        results = []
        for count in (1, 3):
            outputs = [nans(dtype, tokens, 72), nans(dtype, tokens, 24)]
            with threads(count):
                compiled().linear(x, weights, outputs)()
            results.append(torch.cat(outputs, 1))
        assert_same_bits(results)
