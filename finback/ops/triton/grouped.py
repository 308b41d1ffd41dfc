"""Sorting tokens to their experts in Triton: the order, the copies into it, and the sums back (`finback.ops.grouped`).

The order is a counting sort: each program counts the experts among its pairs, the counts are summed, and each program places its pairs,
earlier ones first. The copies are bound by memory: every row is read and written once, 16 bytes to a thread, past the L1 cache, which
no row would be found in again. On Hopper that is an instruction of its own; the interpreter runs the plain branch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.grouped import Dispatch
from finback.ops.triton.cast import rounded

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PAIRS = 128
_BLOCK = 1024


@triton.jit
def count_kernel(experts, counts, pairs, n_experts, width: tl.constexpr, block: tl.constexpr):
    """experts int64 [pairs] -> counts int32 [programs, n_experts] of each program's pairs."""
    pair = tl.program_id(0) * block + tl.arange(0, block)
    own = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32)
    expert = tl.arange(0, width)
    hits = tl.sum((own[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * n_experts + expert, hits, mask=expert < n_experts)


@triton.jit
def place_kernel(experts, starts, order, inverse, pairs, n_experts, block: tl.constexpr):
    """starts int32 [programs, n_experts]: where the first pair of each expert of a program goes."""
    pair = tl.program_id(0) * block + tl.arange(0, block)
    inside = pair < pairs
    own = tl.load(experts + pair, mask=inside, other=0).to(tl.int32)
    earlier = (tl.where(inside, own, -1)[None, :] == own[:, None]) & (pair[None, :] < pair[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    row = (tl.load(starts + tl.program_id(0) * n_experts + own, mask=inside, other=0) + rank).to(tl.int64)
    tl.store(inverse + pair, row, mask=inside)
    tl.store(order + row, pair.to(tl.int64), mask=inside)


@triton.jit
def copy_rows_kernel(source, index, target, words, block: tl.constexpr):
    """target[i] = source[index[i]] for rows of `words` words of 16 bytes, given as int32 pointers."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * block + tl.arange(0, block)
    inside = word < words
    origin = tl.load(index + row)
    read = (origin * words + word) * 4
    write = (row * words + word) * 4
    if _INTERPRETED:
        part = tl.arange(0, 4)
        values = tl.load(source + read[:, None] + part[None, :], mask=inside[:, None], other=0)
        tl.store(target + write[:, None] + part[None, :], values, mask=inside[:, None])
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred inside;
            .reg .b32 a, b, c, d;
            setp.ne.s32 inside, $3, 0;
            @inside ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {a, b, c, d}, [$1];
            @inside st.global.L1::no_allocate.v4.b32 [$2], {a, b, c, d};
            mov.b32 $0, 0;
            }
            """,
            "=r,l,l,r",
            [source + read, target + write, inside.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def sum_rows_kernel(rows, inverse, out, size, choices: tl.constexpr, block: tl.constexpr):
    """out[n] = sum over k of rows[inverse[n, k]], added in float32 in the order of the choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.float32)
    for choice in tl.static_range(choices):
        row = tl.load(inverse + token * choices + choice)
        total += tl.load(rows + row * size + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + token * size + column, rounded(total, out.dtype.element_ty), mask=column < size)


def dispatch_order(expert_indices: Tensor, n_experts: int) -> Dispatch:
    """As `finback.ops.grouped.dispatch_order` with alignment 1."""
    flat = expert_indices.flatten().contiguous()
    pairs, device = flat.numel(), flat.device
    programs = triton.cdiv(pairs, _PAIRS)
    counts = torch.zeros(programs, n_experts, dtype=torch.int32, device=device)
    order, inverse = torch.empty_like(flat), torch.empty_like(flat)
    if pairs:
        count_kernel[(programs,)](flat, counts, pairs, n_experts, triton.next_power_of_2(n_experts), _PAIRS)
    rows = counts.sum(0, dtype=torch.int64)
    starts = (rows.cumsum(0) - rows + counts.cumsum(0) - counts).to(torch.int32)
    if pairs:
        place_kernel[(programs,)](flat, starts, order, inverse, pairs, n_experts, _PAIRS)
    return Dispatch(order, order // expert_indices.shape[1], None, inverse, rows)


def permute(x: Tensor, token: Tensor) -> Tensor:
    """x[token]: each pair's row at its place, [N, D] -> [M, D]. Rows must be whole multiples of 16 bytes."""
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes % 16:
        raise ValueError(f"rows of {x.shape[1]} {x.dtype} are {row_bytes} bytes, and are copied 16 at a time; use index_select")
    out = torch.empty(token.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    words = row_bytes // 16
    if out.numel():
        block = min(triton.next_power_of_2(words), _BLOCK)
        grid = (token.numel(), triton.cdiv(words, block))
        copy_rows_kernel[grid](x.contiguous().view(torch.int32), token, out.view(torch.int32), words, block)
    return out


def unpermute(y: Tensor, inverse: Tensor, tokens: int) -> Tensor:
    """The sum of each token's rows, in the order of its choices: [M, D], inverse int64 [N K] -> [N, D]."""
    size = y.shape[1]
    out = torch.empty(tokens, size, dtype=y.dtype, device=y.device)
    if out.numel():
        block = min(triton.next_power_of_2(size), _BLOCK)
        sum_rows_kernel[(tokens, triton.cdiv(size, block))](y.contiguous(), inverse, out, size, inverse.numel() // tokens, block)
    return out
