"""Compressed rows in C: the bytes of ops/compressed.py, and the bits that the same kernels give over the rows which those stand for."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from finback.ops.compressed import CodeFormat, CompressedRows
from finback.ops.native.arguments import CachedRows, Norm, Projected, RotaryTable
from tests.ops.native.paged import Cache, draw_cache
from tests.ops.native.rule import DTYPES, angles, assert_same_bits, compiled, draw, nans, threads

EPS, SCALE, POSITIONS = 1e-6, 0.2, 1300
FORMATS: list[CodeFormat] = ["int8", "fp8"]
# lengths of the sequences, rows of a block, new tokens of each
PAGED = [([3, 40, 9], 8, 1), ([5, 6, 7, 8, 1], 3, 1), ([70, 33], 32, 5), ([40], 64, 40), ([1100, 3], 64, 1)]


class Latent(NamedTuple):
    heads: int
    nope: int
    rope: int
    rank: int
    value: int
    tile: int


class Grouped(NamedTuple):
    heads: int
    key_heads: int
    size: int
    together: int  # heads that share a scale


LATENT = [Latent(3, 20, 6, 37, 21, 37), Latent(4, 16, 8, 32, 16, 32), Latent(17, 8, 64, 256, 8, 128)]
GROUPED = [Grouped(9, 3, 64, 1), Grouped(6, 2, 34, 2), Grouped(4, 4, 20, 4), Grouped(34, 2, 16, 2), Grouped(16, 8, 128, 1)]


def run_latent(query: Tensor, cached: CachedRows, projected: Projected, s: Latent) -> Tensor:
    output = nans(query.dtype, len(query), s.heads, s.value)
    assert compiled().latent_attention(query, cached, output, s.rank, SCALE, projected)() == 0
    return output


def draw_latent(dtype: torch.dtype, tokens: int, s: Latent) -> tuple[Tensor, Projected]:
    up = draw(dtype, s.heads * (s.nope + s.value), s.rank, scale=s.rank**-0.5)
    compressed = draw(dtype, tokens, s.rank + s.rope)
    return draw(dtype, tokens, s.heads, s.nope + s.rope), Projected(
        compressed, Norm(draw(dtype, s.rank), EPS), rotary_of(s.rope), up, s.nope
    )


def rotary_of(size: int) -> RotaryTable:
    return RotaryTable(*angles(torch.arange(POSITIONS), size))


def unrotated(size: int) -> RotaryTable:
    return RotaryTable(torch.ones(POSITIONS, size // 2), torch.zeros(POSITIONS, size // 2))


def run_grouped(query: Tensor, key: Tensor, value: Tensor, cached: CachedRows, s: Grouped, rotary: RotaryTable) -> Tensor:
    output = nans(query.dtype, *query.shape)
    assert compiled().grouped_query_attention(query, key, value, cached, rotary, output, SCALE)() == 0
    return output


def draw_grouped(dtype: torch.dtype, tokens: int, s: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    width = s.key_heads * s.size
    return draw(dtype, tokens, s.heads * s.size), draw(dtype, tokens, width), draw(dtype, tokens, width)


def slots(cache: Cache) -> list[tuple[int, int]]:
    """Where the query tokens' own rows lie."""
    return [cache.slot(token, position) for token, position in enumerate(cache.positions.tolist())]


def stored(cache: Cache, layout: CompressedRows) -> tuple[CachedRows, Tensor]:
    """The cache in codes, and its bytes: 0xff, which is a number in no format's scales, where no row is."""
    rows = layout.encode(cache.rows)
    rows[cache.rows.isnan().any(-1)] = 0xFF
    return CachedRows(rows, cache.positions, cache.blocks, layout), rows


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows", "new"), PAGED)
@pytest.mark.parametrize("sizes", LATENT)
def test_latents(sizes: Latent, lengths: list[int], block_rows: int, new: int, dtype: torch.dtype, format: CodeFormat) -> None:
    """New rows get the bytes of what the plain cache gets, nothing else is written, and the output is that over decoded rows."""
    layout = CompressedRows(format, sizes.rank, sizes.tile, sizes.rope)
    cache = draw_cache(dtype, lengths, sizes.rank + sizes.rope, block_rows, new)
    query, projected = draw_latent(dtype, len(cache.positions), sizes)
    cached, rows = stored(cache, layout)
    expected = rows.clone()
    run_latent(query, cache.cached(), projected, sizes)
    for slot in slots(cache):
        expected[slot] = layout.encode(cache.rows[slot])
    output = run_latent(query, cached, projected, sizes)
    assert torch.equal(rows, expected)
    ready = query.new_zeros(len(query), sizes.heads, sizes.rank + sizes.rope).normal_()
    decoded = CachedRows(layout.decode(rows, dtype), cache.positions, cache.blocks)
    results = []
    for source in (cached, decoded):
        latents = nans(dtype, len(query), sizes.heads, sizes.rank)
        compiled().latent_attention(ready, source, latents, sizes.rank, SCALE)()
        results.append(latents)
    assert_same_bits(results)
    assert output.isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "block_rows", "new"), PAGED)
@pytest.mark.parametrize("sizes", GROUPED)
def test_keys_and_values(
    sizes: Grouped, lengths: list[int], block_rows: int, new: int, dtype: torch.dtype, format: CodeFormat
) -> None:
    """The same. A plain cache is given the tokens' own rows as they are decoded: unrotated, keys stay as they come."""
    width = 2 * sizes.key_heads * sizes.size
    layout = CompressedRows(format, width, sizes.together * sizes.size, 0)
    cache = draw_cache(dtype, lengths, width, block_rows, new)
    query, key, value = draw_grouped(dtype, len(cache.positions), sizes)
    for rotary in (rotary_of(sizes.size), unrotated(sizes.size)):
        cached, rows = stored(cache, layout)
        expected = rows.clone()
        run_grouped(query, key, value, cache.cached(), sizes, rotary)
        for slot in slots(cache):
            expected[slot] = layout.encode(cache.rows[slot])
        output = run_grouped(query, key, value, cached, sizes, rotary)
        assert torch.equal(rows, expected)
    decoded = layout.decode(rows, dtype)
    own = torch.stack([decoded[slot] for slot in slots(cache)])
    key, value = own[:, : width // 2].contiguous(), own[:, width // 2 :].contiguous()
    plain = run_grouped(query, key, value, CachedRows(decoded, cache.positions, cache.blocks), sizes, unrotated(sizes.size))
    assert output.isfinite().all()
    assert_same_bits([output, plain])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_decoded(dtype: torch.dtype, format: CodeFormat) -> None:
    """A token that looks at one row gets its latent: all codes, at scales from the smallest normal number up."""
    layout = CompressedRows(format, 256, 64, 2)
    rows = torch.zeros(5, 1, layout.row_bytes, dtype=torch.uint8)
    rows[..., :256] = torch.arange(256, dtype=torch.uint8)
    if format == "fp8":
        rows[rows == 0x7F] = 0x7E  # nan comes with a scale that is not finite
        rows[rows == 0xFF] = 0xFE
    for row, scale in enumerate((1.0, 2.0**-126, 1e-30, 0.0371, 6e30)):
        rows[row, :, 256 : 256 + 16] = torch.tensor([scale * 1.0001**tile for tile in range(4)]).view(torch.uint8)
    expected = layout.decode(rows, dtype)[:, :, :256]
    output = nans(dtype, 5, 1, 256)
    cached = CachedRows(rows, torch.zeros(5, dtype=torch.int64), None, layout)
    compiled().latent_attention(torch.zeros(5, 1, 258, dtype=dtype), cached, output, 256, SCALE)()
    assert expected.isfinite().all()
    tiny = torch.finfo(dtype).smallest_normal  # the processor's own rounding to bfloat16 makes zeros of what is smaller
    assert torch.equal(output.where(output.abs() >= tiny, 0), expected.where(expected.abs() >= tiny, 0))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_borders_between_codes_round_to_even(dtype: torch.dtype, format: CodeFormat) -> None:
    """Values halfway between two codes, and beside that, in tiles whose scale is 1, a power of two, or the smallest there is."""
    layout = CompressedRows(format, 2 * 512, 512, 0)
    codes = torch.arange(127.0) if format == "int8" else torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    largest = codes[-1:]
    near = torch.cat([largest, halfway, halfway * (1 + 2.0**-7), halfway * (1 - 2.0**-7), -halfway]).to(dtype)
    near = torch.cat((near, near.new_zeros(512 - len(near))))
    factor = 127 / 126 if format == "int8" else 1.0  # codes end at 126, the largest value is to be the code 127
    near[0] = near[0].float() * factor
    value = torch.stack([near, near * 2.0**-20, near * 2.0**20, near * 2.0**-130, near * 0])
    key = torch.zeros_like(value)
    rows = torch.zeros(5, 1, layout.row_bytes, dtype=torch.uint8)
    cached = CachedRows(rows, torch.zeros(5, dtype=torch.int64), None, layout)
    run_grouped(key, key, value, cached, Grouped(1, 1, 512, 1), rotary_of(512))
    assert torch.equal(rows[:, 0], layout.encode(torch.cat((key, value), 1)))
    assert (rows[0, 0, 513 : 513 + len(halfway)] % 2 == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_spoils_its_own_tile_only(dtype: torch.dtype, format: CodeFormat, bad: float) -> None:
    sizes = Grouped(2, 2, 8, 1)
    layout = CompressedRows(format, 32, 8, 0)
    query, key, value = draw_grouped(dtype, 2, sizes)
    value[1, 3] = bad
    rows = torch.zeros(2, 1, layout.row_bytes, dtype=torch.uint8)
    cached = CachedRows(rows, torch.zeros(2, dtype=torch.int64), None, layout)
    output = run_grouped(query, key, value, cached, sizes, rotary_of(8))
    finite = layout.decode(rows[:, 0], dtype).isfinite()
    spoiled = torch.zeros(2, 32, dtype=torch.bool)
    spoiled[1, 16:24] = True
    assert (finite | spoiled).all()
    assert not finite[1, 19]
    assert output[0].isfinite().all()
    assert output[1, 8:].isfinite().all()
    assert not output[1, 3].isfinite()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "new"), [([90, 5, 41], 1), ([1100], 1), ([50, 600], 7)])
def test_results_do_not_depend_on_threads(lengths: list[int], new: int, dtype: torch.dtype, format: CodeFormat) -> None:
    sizes, grouped = LATENT[2], GROUPED[0]
    layouts = CompressedRows(format, sizes.rank, sizes.tile, sizes.rope), CompressedRows(format, 384, 64, 0)
    results: list[list[Tensor]] = [[], []]
    caches = [draw_cache(dtype, lengths, layout.coded + layout.kept, 16, new) for layout in layouts]
    query, projected = draw_latent(dtype, len(caches[0].positions), sizes)
    inputs = draw_grouped(dtype, len(caches[1].positions), grouped)
    for count in (1, 2, 3):
        with threads(count):
            results[0].append(run_latent(query, stored(caches[0], layouts[0])[0], projected, sizes))
            results[1].append(run_grouped(*inputs, stored(caches[1], layouts[1])[0], grouped, rotary_of(grouped.size)))
    for same in results:
        assert_same_bits(same)
