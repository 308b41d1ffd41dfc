"""Attention of samples that share a prompt, beside each sample alone with its prompt."""

import pytest
import torch
from torch import Tensor

from finback.ops.attention import attention_reference
from finback.ops.native.build import causal_kernels_for
from finback.ops.shared_prefix import SharedPrefixes, shared_prefix_reference
from tests.ops.rule import assert_close_in_float64, assert_low_precision_rule, assert_repeatable

SCALE = 0.3
# No prefix, no continuation, empty ones, one token, blocks of queries and tiles that end anywhere.
LAYOUTS = [
    [(5, [3, 7, 1])],
    [(0, [4, 2]), (9, []), (1, [1]), (6, [0, 12, 0])],
    [(50, [63, 63, 20]), (100, [97, 130])],
    [(97, [5, 200])],
]
HEADS = [(4, 4, 24, 16), (6, 2, 10, 10), (1, 1, 64, 66)]  # of queries, of keys, width of queries and keys, of values


def draw(layout: list[tuple[int, list[int]]], heads: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of a row."""
    many, few, size, width = heads
    tokens = sum(prefix + sum(own) for prefix, own in layout)
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, h, tokens, s, generator=generator).to(dtype) for h, s in ((many, size), (few, size), (few, width))]


def alone(layout: list[tuple[int, list[int]]], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each sequence by itself, from its tokens and those of its prefix."""
    parts, at = list[Tensor](), 0
    for prefix, lengths in layout:
        before = list(range(at, at + prefix))
        at += prefix
        if prefix:
            parts.append(attention_reference(*(t[:, :, before] for t in (query, key, value)), SCALE))
        for length in lengths:
            if length:
                rows = [*before, *range(at, at + length)]
                own = attention_reference(*(t[:, :, rows] for t in (query, key, value)), SCALE)
                parts.append(own[:, :, prefix:])
            at += length
    return torch.cat(parts, 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_each_sample_attends_as_it_does_alone(layout: list[tuple[int, list[int]]], heads: tuple[int, int, int, int]) -> None:
    prefixes = SharedPrefixes(layout, torch.device("cpu"))
    inputs = draw(layout, heads, torch.float32)

    def attend(*inputs: Tensor) -> Tensor:
        return prefixes.attend(*inputs, SCALE)

    def separate(*inputs: Tensor) -> Tensor:
        return alone(layout, *inputs)

    assert_close_in_float64(lambda *inputs: shared_prefix_reference(*inputs, SCALE, prefixes), separate, *inputs)
    assert_close_in_float64(attend, separate, *inputs)  # no kernel takes float64: the reference again
    torch.testing.assert_close(attend(*inputs), separate(*inputs), rtol=1e-5, atol=1e-5)
    assert_repeatable(attend, *inputs)
    for dtype in (torch.float32, torch.bfloat16):
        assert_low_precision_rule(attend, separate, *(t.to(dtype) for t in inputs), dtype=dtype)


def test_the_kernels_are_used_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, inputs = SharedPrefixes(LAYOUTS[0], torch.device("cpu")), draw(LAYOUTS[0], HEADS[0], torch.float32)
    kernels = causal_kernels_for(*inputs)
    if kernels is None:
        pytest.skip("this processor has none that are fast")
    calls = []
    for name in ("attention", "backward"):
        plain = getattr(type(kernels), name)
        monkeypatch.setattr(type(kernels), name, lambda *a, n=name, f=plain: (calls.append(n), f(*a))[1])
    prefixes.attend(*(t.requires_grad_() for t in inputs), SCALE).sum().backward()
    assert calls == ["attention", "backward"]


def test_places_of_a_row_by_hand() -> None:
    prefixes = SharedPrefixes([(2, [1, 2]), (0, [3])], torch.device("cpu"))
    assert prefixes.positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert prefixes.spans.tolist() == [[0, 2], [2, 1], [2, 2], [0, 3]]
    assert prefixes.queries.tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 0], [5, 6, 7]]
    assert prefixes.keys.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 7, 0]]
    assert prefixes.query_at.tolist() == [0, 1, 3, 6, 7, 9, 10, 11]
    assert prefixes.key_at.tolist() == [0, 1, 6, 10, 11, 12, 13, 14]
    assert prefixes.shared == [(slice(0, 3), range(2))]
