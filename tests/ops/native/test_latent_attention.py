"""Attention to cached latents in C against the body in torch."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from finback.ops.attention import latent_attention
from finback.ops.native.arguments import Norm, Projected, RotaryTable
from finback.ops.norm import rms_norm
from finback.ops.rotary import apply_rotary
from tests.ops.native.paged import Cache, draw_cache
from tests.ops.native.rule import DTYPES, angles, assert_same_bits, assert_within_the_rule, compiled, draw, nans, threads, wide

EPS, SCALE, POSITIONS = 1e-6, 0.3, 1200


class Sizes(NamedTuple):
    heads: int
    nope: int
    rope: int
    rank: int
    value: int


SIZES = [Sizes(1, 3, 2, 5, 1), Sizes(4, 16, 8, 32, 16), Sizes(3, 20, 6, 37, 21), Sizes(17, 8, 4, 16, 8), Sizes(5, 33, 16, 64, 50)]
# lengths of the sequences, rows of a block, new tokens of each
PAGED = [
    ([1], 4, 1),
    ([3, 40, 9], 8, 1),
    ([100], 16, 1),
    ([5, 6, 7, 8, 9, 10, 11, 12, 1], 3, 1),
    ([70, 33], 32, 5),
    ([40], 64, 40),
]


def attend(query: Tensor, cache: Cache, rank: int) -> Tensor:
    """[B, H, C + R] -> [B, H, C], token by token."""
    rows = [cache.visible(token) for token in range(len(query))]
    return torch.cat([latent_attention(query[i, None, None], rows[i][None], rank, SCALE)[0] for i in range(len(query))])


def from_projections(query: Tensor, cache: Cache, projected: Projected) -> tuple[Tensor, Tensor]:
    """Everything between the projections and `o_proj`, as the model does it: outputs [B, H, V] and the new rows [B, C + R]."""
    rank, (heads, width) = len(projected.norm.weight), query.shape[1:]
    cosine, sine = (table[cache.positions] for table in projected.rotary)
    latent = rms_norm(projected.compressed[:, :rank], projected.norm.weight, EPS)
    rows = torch.cat((latent, apply_rotary(projected.compressed[:, rank:].clone(), cosine, sine)), 1)
    up = projected.up.view(heads, -1, rank)
    key_up, value_up = up[:, : projected.nope], up[:, projected.nope :]
    nope, rope = query.split([projected.nope, width - projected.nope], -1)
    absorbed = torch.bmm(nope.transpose(0, 1), key_up).transpose(0, 1)
    query = torch.cat((absorbed, apply_rotary(rope.clone(), cosine.unsqueeze(1), sine.unsqueeze(1))), -1)
    latents = attend(query, cache.with_new_rows(rows), rank)
    return torch.bmm(latents.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1), rows


def draw_projected(dtype: torch.dtype, tokens: int, s: Sizes) -> tuple[Tensor, Projected]:
    query = draw(dtype, tokens, s.heads, s.nope + s.rope)
    up = draw(dtype, s.heads * (s.nope + s.value), s.rank, scale=s.rank**-0.5)
    norm = Norm(draw(dtype, s.rank), EPS)
    return query, Projected(
        draw(dtype, tokens, s.rank + s.rope), norm, RotaryTable(*angles(torch.arange(POSITIONS), s.rope)), up, s.nope
    )


def widened(projected: Projected) -> Projected:
    compressed, weight, up = wide(projected.compressed, projected.norm.weight, projected.up)
    return Projected(compressed, Norm(weight, EPS), RotaryTable(*wide(*projected.rotary)), up, projected.nope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows", "new"), PAGED)
@pytest.mark.parametrize("sizes", SIZES)
def test_absorbed_queries_keep_the_error_rule(
    sizes: Sizes, lengths: list[int], block_rows: int, new: int, dtype: torch.dtype
) -> None:
    cache = draw_cache(dtype, lengths, sizes.rank + sizes.rope, block_rows, new)
    query = draw(dtype, len(cache.positions), sizes.heads, sizes.rank + sizes.rope)
    output = nans(dtype, *query.shape[:2], sizes.rank)
    compiled().latent_attention(query, cache.cached(), output, sizes.rank, SCALE)()
    truth = attend(query.double(), cache._replace(rows=cache.rows.double()), sizes.rank)
    assert_within_the_rule(output, attend(query, cache, sizes.rank), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows", "new"), PAGED)
@pytest.mark.parametrize("sizes", SIZES)
def test_projections_keep_the_error_rule(sizes: Sizes, lengths: list[int], block_rows: int, new: int, dtype: torch.dtype) -> None:
    """The rows of new tokens too; several tokens of one sequence see each other's rows."""
    cache = draw_cache(dtype, lengths, sizes.rank + sizes.rope, block_rows, new)
    check_projections(cache, sizes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_blocks_every_sequence_has_one(dtype: torch.dtype) -> None:
    sizes = SIZES[2]
    check_projections(draw_cache(dtype, [3, 50, 1, 17], sizes.rank + sizes.rope, 50, paged=False), sizes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows"), [([1100], 64), ([700, 3, 1025], 32), ([513], 513)])
def test_long_contexts_keep_the_error_rule(lengths: list[int], block_rows: int, dtype: torch.dtype) -> None:
    for sizes in (SIZES[1], SIZES[3]):
        check_projections(draw_cache(dtype, lengths, sizes.rank + sizes.rope, block_rows), sizes, dtype)


def check_projections(cache: Cache, sizes: Sizes, dtype: torch.dtype) -> None:
    tokens = len(cache.positions)
    query, projected = draw_projected(dtype, tokens, sizes)
    output, before = nans(dtype, tokens, sizes.heads, sizes.value), cache.rows.clone()
    plain, plain_rows = from_projections(query, cache, projected)
    truth, true_rows = from_projections(query.double(), cache, widened(projected))
    compiled().latent_attention(query, cache.cached(), output, sizes.rank, SCALE, projected)()
    assert_within_the_rule(output, plain, truth)
    slots = [cache.slot(token, position) for token, position in enumerate(cache.positions.tolist())]
    assert_within_the_rule(torch.stack([cache.rows[slot] for slot in slots]), plain_rows, true_rows)
    for slot in slots:
        cache.rows[slot] = before[slot]
    assert torch.equal(cache.rows.nan_to_num(9), before.nan_to_num(9))  # and nothing else was written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "new"), [([7], 1), ([90, 5, 41], 1), ([1100], 1), ([50, 60], 7)])
@pytest.mark.parametrize("sizes", SIZES[1:4])
def test_results_do_not_depend_on_threads(sizes: Sizes, lengths: list[int], new: int, dtype: torch.dtype) -> None:
    cache = draw_cache(dtype, lengths, sizes.rank + sizes.rope, 16, new)
    query, projected = draw_projected(dtype, len(cache.positions), sizes)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            output = nans(dtype, len(query), sizes.heads, sizes.value)
            compiled().latent_attention(query, cache.cached(), output, sizes.rank, SCALE, projected)()
            results.append(output)
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_are_written_before_a_token_attends(dtype: torch.dtype) -> None:
    """A prompt in one call, by more threads than there are cores: some come late, and nobody may read what they have yet to write."""
    sizes = SIZES[1]
    cache = draw_cache(dtype, [24], sizes.rank + sizes.rope, 16, new=24)
    query, projected = draw_projected(dtype, 24, sizes)
    results = []
    for count in (1, *[8] * 40):
        with threads(count):
            cache.rows.fill_(torch.nan)
            output = nans(dtype, 24, sizes.heads, sizes.value)
            compiled().latent_attention(query, cache.cached(), output, sizes.rank, SCALE, projected)()
            results.append(output)
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Alone or in a batch, as one of several tokens or by itself: the same bits."""
    sizes = SIZES[2]
    cache = draw_cache(dtype, [30, 61], sizes.rank + sizes.rope, 8, new=3)
    query, projected = draw_projected(dtype, 6, sizes)
    together = nans(dtype, 6, sizes.heads, sizes.value)
    compiled().latent_attention(query, cache.cached(), together, sizes.rank, SCALE, projected)()
    assert cache.blocks is not None
    for token in range(6):
        one = slice(token, token + 1)
        alone = nans(dtype, 1, sizes.heads, sizes.value)
        latents = Cache(cache.rows, cache.positions[one], cache.blocks[one]).cached()
        of_token = projected._replace(compressed=projected.compressed[one])
        compiled().latent_attention(query[one], latents, alone, sizes.rank, SCALE, of_token)()
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_sequence(bad: float, dtype: torch.dtype) -> None:
    sizes = SIZES[1]
    cache = draw_cache(dtype, [20, 30], sizes.rank + sizes.rope, 16)
    query = draw(dtype, 2, sizes.heads, sizes.rank + sizes.rope)
    query[1, 2, 3] = bad
    output = nans(dtype, 2, sizes.heads, sizes.rank)
    compiled().latent_attention(query, cache.cached(), output, sizes.rank, SCALE)()
    expected = torch.zeros(2, sizes.heads, sizes.rank, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(output.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    sizes = SIZES[1]
    cache = draw_cache(dtype, [200], sizes.rank + sizes.rope, 16)
    cache.rows.mul_(50)
    query = draw(dtype, 1, sizes.heads, sizes.rank + sizes.rope, scale=50)
    output = nans(dtype, 1, sizes.heads, sizes.rank)
    compiled().latent_attention(query, cache.cached(), output, sizes.rank, SCALE)()
    truth = attend(query.double(), cache._replace(rows=cache.rows.double()), sizes.rank)
    torch.testing.assert_close(output.double(), truth, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
