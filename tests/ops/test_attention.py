"""Attention: the blocked CPU kernel, torch's, and the absorbed one against the formula, with gradients."""

import pytest
import torch
from torch import Tensor

from finback.ops.attention import (
    attention_reference,
    blocked_attention,
    causal_attention,
    document_mask,
    grouped_attention,
    latent_attention,
)
from tests.ops.rule import assert_close_in_float64, assert_low_precision_rule, assert_repeatable, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("implementation")

# batch, heads, tokens, query and key width, value width
SHAPES = [
    (1, 1, 1, 3, 2),
    (2, 3, 2, 8, 8),
    (2, 2, 7, 12, 8),
    (2, 2, 127, 6, 4),
    (1, 2, 128, 4, 6),
    (2, 1, 129, 5, 5),
    (1, 2, 256, 4, 3),
    (1, 3, 257, 3, 4),
    (2, 16, 300, 4, 2),  # more scores than are kept alive at once: heads come in unequal groups
]
SCALE = 0.37


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula, softmax in float32 or better."""
    scores = query @ key.transpose(-1, -2) * SCALE
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(value.dtype) @ value


def draw(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, size: float = 1.0) -> tuple[Tensor, ...]:
    batch, heads, tokens, width, value_width = shape
    sizes = (width, width, value_width)
    return tuple((size * torch.randn(batch, heads, tokens, s)).to(dtype) for s in sizes)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal_attention(query, key, value, SCALE)


def blocked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return blocked_attention(query, key, value, SCALE)


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention_reference(query, key, value, SCALE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [causal, blocked, reference])
def test_causal_attention_equals_the_formula(function: object, shape: tuple[int, int, int, int, int]) -> None:
    assert_close_in_float64(function, naive, *draw(shape))  # type: ignore[arg-type]


def test_causal_attention_passes_gradcheck() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in draw((1, 2, 5, 4, 3))]
    assert torch.autograd.gradcheck(causal, inputs)


@pytest.mark.parametrize("tokens", [5, 129])
def test_causal_attention_is_the_same_without_gradients(tokens: int) -> None:
    query, key, value = draw((2, 2, tokens, 8, 6))
    with torch.no_grad():
        fast = causal(query, key, value)
    assert torch.equal(fast, causal(query.requires_grad_(), key, value))


def test_causal_attention_takes_any_strides() -> None:
    """Heads behind tokens, as projections give them, and a gradient that is one number repeated."""
    query, key, value = (
        tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in draw((2, 3, 130, 8, 6))
    )
    causal(query, key, value).sum().backward()
    expected = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    naive(*expected).sum().backward()
    for one, other in zip((query, key, value), expected, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < 1e-5


def test_later_tokens_change_nothing_before_them() -> None:
    query, key, value = draw((1, 2, 200, 8, 8))
    whole = causal(query, key, value)
    for end in (1, 100, 128, 150):
        part = causal(query[:, :, :end], key[:, :, :end], value[:, :, :end])
        torch.testing.assert_close(whole[:, :, :end], part, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = draw((1, 1, 140, 8, 4), size=60.0)
    for tensor in outputs_and_gradients(causal, (query, key, value)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(2, 4, 140, 24, 16), (1, 2, 300, 16, 16), (1, 2, 64, 8, 24)])
def test_causal_attention_in_bf16_keeps_the_error_rule(shape: tuple[int, int, int, int, int], spread: float) -> None:
    """Against the plain formula, whose products round to bfloat16, for scores of standard deviation `spread`."""
    assert_low_precision_rule(causal, naive, *draw(shape, torch.bfloat16, _size(shape, spread)))


@pytest.mark.parametrize("shape", [(2, 4, 140, 24, 16), (1, 2, 300, 16, 16), (1, 2, 64, 8, 24)])
def test_causal_attention_in_bf16_keeps_the_error_rule_against_the_fused_kernel(shape: tuple[int, int, int, int, int]) -> None:
    """torch's kernel keeps scores in float32 inside. For scores as far apart as a model's at its start, ours is within the rule."""
    assert_low_precision_rule(causal, reference, *draw(shape, torch.bfloat16, _size(shape, 0.7)))


def _size(shape: tuple[int, int, int, int, int], spread: float) -> float:
    return (spread / (SCALE * shape[3] ** 0.5)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_attention_is_repeatable(dtype: torch.dtype) -> None:
    assert_repeatable(causal, *draw((2, 3, 200, 16, 8), dtype))


@pytest.mark.parametrize("widths", [(8, 4), (8, 8), (4, 8)])
def test_a_mask_replaces_causality(widths: tuple[int, int]) -> None:
    """More keys than queries too, as in a prefill behind cached tokens."""
    width, value_width = widths
    query, key, value = torch.randn(2, 3, 4, width), torch.randn(2, 3, 9, width), torch.randn(2, 3, 9, value_width)
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5)

    def masked(*inputs: Tensor) -> Tensor:
        return causal_attention(*inputs, SCALE, mask)

    assert_close_in_float64(masked, lambda *inputs: naive(*inputs, mask), query, key, value)


def test_without_a_mask_queries_and_keys_must_be_equally_many() -> None:
    """Causal from which corner? Nobody may guess: one query behind cached tokens must not see the first key only."""
    query, key = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 6, 4)
    with pytest.raises((AssertionError, ValueError)):
        causal_attention(query, key, key, SCALE)


def test_document_mask_written_out() -> None:
    mask = document_mask(torch.tensor([[7, 7, 3, 3, 3], [0, 1, 1, 1, 0]]))
    assert mask.shape == (2, 1, 5, 5)
    rows = [["1....", "11...", "..1..", "..11.", "..111"], ["1....", ".1...", ".11..", ".111.", "1...1"]]
    expected = [[[[character == "1" for character in row] for row in rows_of]] for rows_of in rows]
    assert mask.tolist() == expected


@pytest.mark.parametrize("masked", [False, True])
def test_latent_attention_equals_the_formula(masked: bool) -> None:
    """Every head attends to the same rows; the value is a part of the key."""
    rank, mask = 6, torch.ones(3, 9, dtype=torch.bool).tril(6)[:, None] if masked else None

    def absorbed(query: Tensor, latents: Tensor) -> Tensor:
        return latent_attention(query, latents, rank, SCALE, mask)

    def expanded(query: Tensor, latents: Tensor) -> Tensor:
        keys = latents.unsqueeze(1).expand(-1, query.shape[2], -1, -1)
        whole = torch.ones(3, 9, dtype=torch.bool) if mask is None else mask[:, 0]
        return naive(query.transpose(1, 2), keys, keys[..., :rank], whole).transpose(1, 2)

    inputs = torch.randn(2, 3, 4, 10), torch.randn(2, 9, 10)
    ours, theirs = outputs_and_gradients(absorbed, inputs), outputs_and_gradients(expanded, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_latent_attention_in_bf16_keeps_the_error_rule() -> None:
    rank = 32

    def plain(query: Tensor, latents: Tensor) -> Tensor:
        keys = latents.unsqueeze(1).expand(-1, query.shape[2], -1, -1)
        return naive(query.transpose(1, 2), keys, keys[..., :rank], torch.ones(1, 50, dtype=torch.bool)).transpose(1, 2)

    inputs = torch.randn(2, 1, 4, 40).bfloat16(), torch.randn(2, 50, 40).bfloat16()
    assert_low_precision_rule(lambda query, latents: latent_attention(query, latents, rank, SCALE), plain, *inputs)


# Grouped queries: batch, query heads, key heads, tokens, width

GROUPED = [(1, 2, 1, 1, 4), (2, 4, 2, 7, 6), (1, 6, 2, 129, 4), (2, 3, 1, 257, 5), (2, 32, 8, 300, 2)]


def draw_grouped(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, shared, tokens, width = shape
    query, key, value = (torch.randn(batch, h, tokens, width).to(dtype) for h in (heads, shared, shared))
    return query, key, value


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula with keys and values written out for every query head."""
    share = query.shape[1] // key.shape[1]
    return naive(query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1))


@pytest.mark.parametrize("shape", GROUPED)
@pytest.mark.parametrize("function", [causal, blocked, reference])
def test_grouped_queries_equal_the_formula(function: object, shape: tuple[int, int, int, int, int]) -> None:
    assert_close_in_float64(function, repeated, *draw_grouped(shape))  # type: ignore[arg-type]


def test_grouped_queries_in_bf16_keep_the_error_rule() -> None:
    assert_low_precision_rule(causal, repeated, *draw_grouped((2, 6, 2, 140, 16), torch.bfloat16))


def test_grouped_queries_pass_gradcheck() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in draw_grouped((1, 4, 2, 5, 3))]
    assert torch.autograd.gradcheck(causal, inputs)


@pytest.mark.parametrize("share", [1, 3])
def test_attention_over_cached_rows_equals_the_formula(share: int) -> None:
    """The last tokens of a sequence over all of its keys, which are views of a cache."""
    query, key, value = draw_grouped((2, 2 * share, 2, 9, 4))
    expected = repeated(query, key, value)[:, :, 5:].transpose(1, 2)
    cache = torch.cat((key, value), -1).transpose(1, 2).contiguous()
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5)
    last = query[:, :, 5:].transpose(1, 2).contiguous()
    torch.testing.assert_close(grouped_attention(last, cache[..., :4], cache[..., 4:], SCALE, mask), expected)
    one = grouped_attention(last[:, -1:], cache[..., :4], cache[..., 4:], SCALE)
    torch.testing.assert_close(one, expected[:, -1:])
