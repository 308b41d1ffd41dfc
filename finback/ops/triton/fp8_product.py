"""The FP8 product with fine-grained scales in Triton, plain and grouped (V3 section 3.3.2; the layouts are DeepGEMM's).

A program computes one tile of the output. For each 128 elements of the summed dimension it multiplies two E4M3 tiles on the tensor
cores (four instructions of 32 on Hopper), then promotes the partial sum: scales it by both tiles' scales and adds it in float32
registers. Programs that share rows of b run one after another, so that the rows stay in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.fp8 import TILE
from finback.ops.triton.cast import rounded

_BLOCK_M = 128
_BLOCK_N = 128
_GROUP_M = 8


@triton.jit
def _tile_of(program, tiles_m, tiles_n, group_m: tl.constexpr):
    """Row and column of the program's tile: columns of `group_m` tiles, one after another."""
    per_group = group_m * tiles_n
    first = program // per_group * group_m
    height = tl.minimum(tiles_m - first, group_m)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def _accumulate(
    a, a_scale, b, b_scale, row, column, rows, columns, depth, tiles_k,
    block_m: tl.constexpr, block_n: tl.constexpr, tile: tl.constexpr, b_by_rows: tl.constexpr,
):  # fmt: skip
    """Sum over tiles of the summed dimension: a[row] times b[column]^T, in float32 [block_m, block_n]."""
    k = tl.arange(0, tile)
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    a_row = a + row[:, None].to(tl.int64) * depth + k[None, :]
    b_row = b + column[None, :].to(tl.int64) * depth + k[:, None]
    for step in range(tiles_k):
        inside = k < depth - step * tile
        left = tl.load(a_row + step * tile, mask=(row[:, None] < rows) & inside[None, :], other=0.0)
        right = tl.load(b_row + step * tile, mask=(column[None, :] < columns) & inside[:, None], other=0.0)
        partial = tl.dot(left, right)
        left_scale = tl.load(a_scale + row.to(tl.int64) * tiles_k + step, mask=row < rows, other=0.0)
        place = column if b_by_rows else column // tile
        right_scale = tl.load(b_scale + place.to(tl.int64) * tiles_k + step, mask=column < columns, other=0.0)
        total += partial * left_scale[:, None] * right_scale[None, :]
    return total


@triton.jit
def fp8_gemm_kernel(
    a, a_scale, b, b_scale, out, rows, columns, depth, tiles_k,
    block_m: tl.constexpr, block_n: tl.constexpr, tile: tl.constexpr, group_m: tl.constexpr, b_by_rows: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = a [rows, depth] b [columns, depth]^T."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(rows, block_m), tl.cdiv(columns, block_n), group_m)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    total = _accumulate(
        a, a_scale, b, b_scale, row, column, rows, columns, depth, tiles_k, block_m, block_n, tile, b_by_rows
    )  # fmt: skip
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit
def grouped_fp8_gemm_kernel(
    a, a_scale, b, b_scale, out, first_rows, group_rows, columns, depth, tiles_k, scale_rows,
    block_m: tl.constexpr, block_n: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """For each group e: out[first : first + n] = a[first : first + n] b[e]^T with first = first_rows[e], n = group_rows[e].

    The third dimension of the grid is the group. A program whose tile begins behind the group's rows ends at once: groups may be
    ragged, and the host need not know their sizes.
    """
    group = tl.program_id(2)
    first = tl.load(first_rows + group).to(tl.int64)
    rows = tl.load(group_rows + group).to(tl.int32)
    if tl.program_id(0) * block_m >= rows:
        return
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    total = _accumulate(
        a + first * depth, a_scale + first * tiles_k, b + group.to(tl.int64) * columns * depth,
        b_scale + group.to(tl.int64) * scale_rows * tiles_k, row, column, rows, columns, depth, tiles_k, block_m, block_n, tile, False,
    )  # fmt: skip
    place = (first + row[:, None]) * columns + column[None, :]
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < columns))


def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """As `finback.ops.fp8_product.fp8_gemm`."""
    a, b, a_scale, b_scale = a.contiguous(), b.contiguous(), a_scale.contiguous(), b_scale.contiguous()
    rows, depth = a.shape
    columns, tiles = b.shape[0], -(-depth // TILE)
    blocks = (-(-columns // TILE), tiles)
    by_rows = b_scale.shape == (columns, tiles) and b_scale.shape != blocks
    if b.shape[1] != depth or a_scale.shape != (rows, tiles) or not (by_rows or b_scale.shape == blocks):
        raise ValueError(
            f"fp8_gemm got a {list(a.shape)} with scales {list(a_scale.shape)} and b {list(b.shape)} with scales "
            f"{list(b_scale.shape)}; it needs [M, K], [M, {tiles}], [N, K] and {list(blocks)} or {[columns, tiles]}"
        )
    out = torch.empty(rows, columns, dtype=out_dtype, device=a.device)
    grid = (triton.cdiv(rows, _BLOCK_M) * triton.cdiv(columns, _BLOCK_N),)
    if out.numel():
        fp8_gemm_kernel[grid](
            a, a_scale, b, b_scale, out, rows, columns, depth, tiles,
            block_m=_BLOCK_M, block_n=_BLOCK_N, tile=TILE, group_m=_GROUP_M, b_by_rows=by_rows, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


def grouped_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of group e times b[e]^T, the groups one behind another ("contiguous", training and prefill): a [M, K] with scales
    [M, ceil(K / 128)], b [E, N, K] with scales [E, ceil(N / 128), ceil(K / 128)], counts int64 [E] -> [M, N]."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    _grouped(a, a_scale, b, b_scale, counts.cumsum(0) - counts, counts, a.shape[0], out)
    return out


def masked_fp8_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same where each group has room for R rows and uses the first counts[e] ("masked", decode: the shapes never change):
    a [E, R, K] with scales [E, R, ceil(K / 128)] -> [E, R, N]; rows that are not used are zero."""
    groups, room = a.shape[:2]
    out = torch.zeros(groups, room, b.shape[1], dtype=out_dtype, device=a.device)
    first = torch.arange(groups, device=a.device) * room
    _grouped(a.flatten(0, 1), a_scale.flatten(0, 1), b, b_scale, first, counts, room, out)
    return out


def _grouped(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, first_rows: Tensor, counts: Tensor, most_rows: int, out: Tensor
) -> None:
    groups, columns, depth = b.shape
    tiles = -(-depth // TILE)
    if b_scale.shape != (groups, -(-columns // TILE), tiles) or a.shape[1] != depth or a_scale.shape != (a.shape[0], tiles):
        raise ValueError(
            f"the grouped product got a {list(a.shape)} with scales {list(a_scale.shape)} and b {list(b.shape)} with scales "
            f"{list(b_scale.shape)}; scales are one for each 128 elements of K, and for b for each 128 of N"
        )
    if out.numel():
        grid = (triton.cdiv(most_rows, _BLOCK_M), triton.cdiv(columns, _BLOCK_N), groups)
        grouped_fp8_gemm_kernel[grid](
            a.contiguous(), a_scale.contiguous(), b.contiguous(), b_scale.contiguous(), out, first_rows, counts, columns, depth, tiles,
            b_scale.shape[1], block_m=_BLOCK_M, block_n=_BLOCK_N, tile=TILE, num_warps=8, num_stages=3,
        )  # fmt: skip
