"""Attention of several query heads to one key head each, in C, against the formula as Llama, Qwen2 and Qwen3 compute it."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from finback.ops.native.arguments import Norm, RotaryTable
from finback.ops.norm import rms_norm
from tests.ops.native.paged import Cache, draw_cache
from tests.ops.native.rule import DTYPES, angles, assert_same_bits, assert_within_the_rule, compiled, draw, nans, threads, wide

EPS, SCALE, POSITIONS = 1e-6, 0.2, 5000


class Sizes(NamedTuple):
    heads: int
    key_heads: int
    size: int


SIZES = [Sizes(1, 1, 2), Sizes(9, 3, 64), Sizes(4, 4, 20), Sizes(6, 2, 34), Sizes(14, 2, 64), Sizes(34, 2, 16), Sizes(16, 8, 128)]
# lengths of the sequences, rows of a block, new tokens of each
PAGED = [
    ([1], 4, 1),
    ([3, 40, 9], 8, 1),
    ([100], 16, 1),
    ([5, 6, 7, 8, 9, 10, 11, 12, 1], 3, 1),
    ([70, 33], 32, 5),
    ([40], 64, 40),
]


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None


def draw_inputs(dtype: torch.dtype, tokens: int, s: Sizes, norms: bool) -> Inputs:
    key, value = draw(dtype, tokens, s.key_heads * s.size), draw(dtype, tokens, s.key_heads * s.size)
    query_norm, key_norm = (draw(dtype, s.size), draw(dtype, s.size)) if norms else (None, None)
    return Inputs(draw(dtype, tokens, s.heads * s.size), key, value, query_norm, key_norm)


def rotate_half(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, H, d] by angles [B, d / 2], in float32 or better."""
    cosine, sine = (torch.cat((table, table), -1).unsqueeze(1) for table in (cosine, sine))
    first, second = x.chunk(2, -1)
    return (x * cosine + torch.cat((-second, first), -1) * sine).to(x.dtype)


def attend(inputs: Inputs, cache: Cache, rotary: RotaryTable, s: Sizes) -> tuple[Tensor, Tensor]:
    """Outputs [B, H d] and the new rows [B, 2 KV d], softmax in float32 or better."""
    tokens = len(inputs.query)
    query, key = inputs.query.view(tokens, s.heads, s.size), inputs.key.view(tokens, s.key_heads, s.size)
    if inputs.query_norm is not None and inputs.key_norm is not None:
        query, key = rms_norm(query, inputs.query_norm, EPS), rms_norm(key, inputs.key_norm, EPS)
    turns = [table[cache.positions] for table in rotary]
    query, key = rotate_half(query, *turns), rotate_half(key, *turns)
    rows = torch.cat((key.flatten(1), inputs.value), 1)
    cache, outputs = cache.with_new_rows(rows), []
    for token in range(tokens):
        keys, values = cache.visible(token).view(-1, 2, s.key_heads, s.size).permute(1, 2, 0, 3)
        queries = query[token].view(s.key_heads, -1, s.size)
        scores = (queries @ keys.transpose(1, 2)).to(torch.promote_types(query.dtype, torch.float32)) * SCALE
        outputs.append((scores.softmax(-1).to(values.dtype) @ values).flatten())
    return torch.stack(outputs), rows


def run(inputs: Inputs, cache: Cache, rotary: RotaryTable) -> Tensor:
    output = nans(inputs.query.dtype, *inputs.query.shape)
    norms = [None if norm is None else Norm(norm, EPS) for norm in inputs[3:]]
    call = compiled().grouped_query_attention(*inputs[:3], cache.cached(), rotary, output, SCALE, *norms)
    assert call() == 0
    return output


def check(inputs: Inputs, cache: Cache, s: Sizes) -> None:
    rotary, before = RotaryTable(*angles(torch.arange(POSITIONS), s.size)), cache.rows.clone()
    plain, plain_rows = attend(inputs, cache, rotary, s)
    exact = Inputs(*(None if tensor is None else tensor.double() for tensor in inputs))  # type: ignore[arg-type]
    truth, true_rows = attend(exact, cache, RotaryTable(*wide(*rotary)), s)
    assert_within_the_rule(run(inputs, cache, rotary), plain, truth)
    slots = [cache.slot(token, position) for token, position in enumerate(cache.positions.tolist())]
    assert_within_the_rule(torch.stack([cache.rows[slot] for slot in slots]), plain_rows, true_rows)
    for slot in slots:
        cache.rows[slot] = before[slot]
    assert torch.equal(cache.rows.nan_to_num(9), before.nan_to_num(9))  # and nothing else was written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows", "new"), PAGED)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_keeps_the_error_rule(
    sizes: Sizes, norms: bool, lengths: list[int], block_rows: int, new: int, dtype: torch.dtype
) -> None:
    """The rows of new tokens too; several tokens of one sequence see each other's rows."""
    cache = draw_cache(dtype, lengths, 2 * sizes.key_heads * sizes.size, block_rows, new)
    check(draw_inputs(dtype, len(cache.positions), sizes, norms), cache, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_blocks_every_sequence_has_one(dtype: torch.dtype) -> None:
    sizes = SIZES[1]
    cache = draw_cache(dtype, [3, 50, 1, 17], 2 * sizes.key_heads * sizes.size, 50, paged=False)
    check(draw_inputs(dtype, 4, sizes, norms=False), cache, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows"), [([1100], 64), ([700, 3, 1025], 32), ([257], 257), ([4500], 64)])
def test_long_contexts_keep_the_error_rule(lengths: list[int], block_rows: int, dtype: torch.dtype) -> None:
    for sizes in (SIZES[3], SIZES[5]):
        cache = draw_cache(dtype, lengths, 2 * sizes.key_heads * sizes.size, block_rows)
        check(draw_inputs(dtype, len(lengths), sizes, norms=False), cache, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "new"), [([7], 1), ([90, 5, 41], 1), ([1100], 1), ([50, 600], 7)])
@pytest.mark.parametrize("sizes", SIZES[1:5])
def test_results_do_not_depend_on_threads(sizes: Sizes, lengths: list[int], new: int, dtype: torch.dtype) -> None:
    cache = draw_cache(dtype, lengths, 2 * sizes.key_heads * sizes.size, 16, new)
    inputs = draw_inputs(dtype, len(cache.positions), sizes, norms=True)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(inputs, cache, RotaryTable(*angles(torch.arange(POSITIONS), sizes.size))))
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_are_written_before_a_token_attends(dtype: torch.dtype) -> None:
    """A prompt in one call, by more threads than there are cores: some come late, and nobody may read what they have yet to write."""
    sizes = SIZES[1]
    cache = draw_cache(dtype, [24], 2 * sizes.key_heads * sizes.size, 16, new=24)
    inputs = draw_inputs(dtype, 24, sizes, norms=True)
    rotary = RotaryTable(*angles(torch.arange(POSITIONS), sizes.size))
    with threads(1):
        expected = run(inputs, cache, rotary)
    with threads(8):
        for _ in range(40):
            cache.rows.fill_(torch.nan)
            assert_same_bits([expected, run(inputs, cache, rotary)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[30, 61], [20, 700]])
def test_a_sequence_does_not_depend_on_its_neighbours(lengths: list[int], dtype: torch.dtype) -> None:
    """Alone or in a batch, as one of several tokens or by itself: the same bits."""
    sizes = SIZES[1]
    cache = draw_cache(dtype, lengths, 2 * sizes.key_heads * sizes.size, 8, new=3)
    inputs, rotary = draw_inputs(dtype, 6, sizes, norms=False), RotaryTable(*angles(torch.arange(POSITIONS), sizes.size))
    together = run(inputs, cache, rotary)
    assert cache.blocks is not None
    for token in range(6):
        one = slice(token, token + 1)
        alone = Inputs(inputs.query[one], inputs.key[one], inputs.value[one], None, None)
        assert torch.equal(run(alone, Cache(cache.rows, cache.positions[one], cache.blocks[one]), rotary)[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_head(bad: float, dtype: torch.dtype) -> None:
    sizes = SIZES[1]
    cache = draw_cache(dtype, [20, 300], 2 * sizes.key_heads * sizes.size, 16)
    inputs = draw_inputs(dtype, 2, sizes, norms=False)
    inputs.query.view(2, sizes.heads, sizes.size)[1, 4, 3] = bad
    output = run(inputs, cache, RotaryTable(*angles(torch.arange(POSITIONS), sizes.size)))
    expected = torch.zeros(2, sizes.heads, sizes.size, dtype=torch.bool)
    expected[1, 4] = True
    assert torch.equal(output.isnan(), expected.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """All weight is on the one position that looks most like the query."""
    sizes = Sizes(2, 1, 8)
    cache = draw_cache(dtype, [400], 16, 16)
    inputs = Inputs(50 * draw(dtype, 1, 16), draw(dtype, 1, 8), draw(dtype, 1, 8), None, None)
    cache.rows[..., :8] *= 50
    rotary = RotaryTable(*angles(torch.arange(POSITIONS), 8))
    exact = Inputs(*wide(*inputs[:3]), None, None)
    truth, _ = attend(exact, cache, RotaryTable(*wide(*rotary)), sizes)
    torch.testing.assert_close(run(inputs, cache, rotary).double(), truth, rtol=1e-2, atol=1e-3)
