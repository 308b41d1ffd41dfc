"""Causal attention with heads of unequal size in Triton, both directions: MLA's prefill and training.

Queries and keys have N + R values (two products, since N + R is no power of two), values V. Forward is the blocked softmax over causal
tiles; it keeps the logarithm of each query's sum, from which backward makes the weights of a tile again, so nothing of T x T values is
stored. Backward takes two passes: one program for each tile of queries, then one for each tile of keys, which adds up all the query
heads that share them. With D = sum(grad x out) of a query, the gradient of its scores is weights x (grad value^T - D).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finback.ops.triton.cast import dot, rounded

_LOWEST = tl.constexpr(float("-inf"))
_BLOCK = 64


@triton.jit
def load_parts(rows, inside, nope: tl.constexpr, rope: tl.constexpr):
    """Queries or keys that begin at the pointers `rows` [n, 1], in their two parts; zeros where not `inside` [n, 1]."""
    d, r = tl.arange(0, nope), tl.arange(0, rope)
    return tl.load(rows + d[None, :], mask=inside, other=0.0), tl.load(rows + nope + r[None, :], mask=inside, other=0.0)


@triton.jit
def store_parts(rows, inside, first, second, nope: tl.constexpr, rope: tl.constexpr):
    """The two parts, rounded, to where `load_parts` would find them."""
    d, r = tl.arange(0, nope), tl.arange(0, rope)
    tl.store(rows + d[None, :], rounded(first, rows.dtype.element_ty), mask=inside)
    tl.store(rows + nope + r[None, :], rounded(second, rows.dtype.element_ty), mask=inside)


@triton.jit
def scores_of(a_nope, a_rope, b_nope, b_rope, scale):
    """scale a b^T of rows in two parts."""
    return (dot(a_nope, tl.trans(b_nope)) + dot(a_rope, tl.trans(b_rope))) * scale


@triton.jit
def key_row(head, heads, heads_per_key, tokens):
    """The first row among the keys [B, H / G, T] of a head of the queries [B, H, T]."""
    return ((head // heads) * (heads // heads_per_key) + head % heads // heads_per_key).to(tl.int64) * tokens


@triton.jit
def forward_kernel(
    query, key, value, out, log_sum, tokens, heads, heads_per_key, scale,
    nope: tl.constexpr, rope: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """block_m queries of one head: query [B, H, T, nope + rope], key [B, H / G, T, nope + rope], value [B, H / G, T, width] -> out
    [B, H, T, width] and log_sum float32 [B, H, T], the logarithm of the sum of exp(scores)."""
    head = tl.program_id(1)
    first_key = key_row(head, heads, heads_per_key, tokens)
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n, v = tl.arange(0, block_n), tl.arange(0, width)
    size: tl.constexpr = nope + rope
    row = head.to(tl.int64) * tokens + m
    inside = m[:, None] < tokens
    q_nope, q_rope = load_parts(query + row[:, None] * size, inside, nope, rope)
    largest = tl.full((block_m,), float("-inf"), tl.float32)
    weight = tl.zeros((block_m,), tl.float32)
    total = tl.zeros((block_m, width), tl.float32)
    for start in range(0, tl.minimum(tokens, (tl.program_id(0) + 1) * block_m), block_n):
        place = start + n
        there = place[:, None] < tokens
        k_nope, k_rope = load_parts(key + (first_key + place[:, None]) * size, there, nope, rope)
        values = tl.load(value + (first_key + place[:, None]) * width + v[None, :], mask=there, other=0.0)
        scores = scores_of(q_nope, q_rope, k_nope, k_rope, scale)
        scores = tl.where((place[None, :] <= m[:, None]) & (place[None, :] < tokens), scores, _LOWEST)
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - higher)
        powers = tl.exp(scores - higher[:, None])
        weight = weight * shrink + tl.sum(powers, 1)
        total = total * shrink[:, None] + dot(rounded(powers, values.dtype), values)
        largest = higher
    result = rounded(total / weight[:, None], out.dtype.element_ty)
    tl.store(out + row[:, None] * width + v[None, :], result, mask=inside)
    tl.store(log_sum + row, largest + tl.log(weight), mask=m < tokens)


@triton.jit
def query_gradient_kernel(
    query, key, value, out, log_sum, grad, grad_query, row_sum, tokens, heads, heads_per_key, scale,
    nope: tl.constexpr, rope: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """The gradient of block_m queries of one head from that of `out`, and their D into row_sum float32 [B, H, T]."""
    head = tl.program_id(1)
    first_key = key_row(head, heads, heads_per_key, tokens)
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    n, v = tl.arange(0, block_n), tl.arange(0, width)
    size: tl.constexpr = nope + rope
    row = head.to(tl.int64) * tokens + m
    inside = m[:, None] < tokens
    q_nope, q_rope = load_parts(query + row[:, None] * size, inside, nope, rope)
    g = tl.load(grad + row[:, None] * width + v[None, :], mask=inside, other=0.0)
    result = tl.load(out + row[:, None] * width + v[None, :], mask=inside, other=0.0)
    summed = tl.sum(g.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(row_sum + row, summed, mask=m < tokens)
    logs = tl.load(log_sum + row, mask=m < tokens, other=0.0)
    grad_nope = tl.zeros((block_m, nope), tl.float32)
    grad_rope = tl.zeros((block_m, rope), tl.float32)
    for start in range(0, tl.minimum(tokens, (tl.program_id(0) + 1) * block_m), block_n):
        place = start + n
        there = place[:, None] < tokens
        k_nope, k_rope = load_parts(key + (first_key + place[:, None]) * size, there, nope, rope)
        values = tl.load(value + (first_key + place[:, None]) * width + v[None, :], mask=there, other=0.0)
        scores = scores_of(q_nope, q_rope, k_nope, k_rope, scale)
        seen = (place[None, :] <= m[:, None]) & inside
        weights = tl.where(seen, tl.exp(scores - logs[:, None]), 0.0)
        grad_scores = rounded(weights * (dot(g, tl.trans(values)) - summed[:, None]) * scale, k_nope.dtype)
        grad_nope += dot(grad_scores, k_nope)
        grad_rope += dot(grad_scores, k_rope)
    store_parts(grad_query + row[:, None] * size, inside, grad_nope, grad_rope, nope, rope)


@triton.jit
def key_gradient_kernel(
    query, key, value, log_sum, row_sum, grad, grad_key, grad_value, tokens, heads, heads_per_key, scale,
    nope: tl.constexpr, rope: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """The gradients of block_n keys and values of one head, over all queries that see them, of all heads that share them."""
    shared = tl.program_id(1)
    key_heads = heads // heads_per_key
    first_head = (shared // key_heads) * heads + shared % key_heads * heads_per_key
    first = tl.program_id(0) * block_n
    place = first + tl.arange(0, block_n)
    v = tl.arange(0, width)
    size: tl.constexpr = nope + rope
    row = shared.to(tl.int64) * tokens + place
    inside = place[:, None] < tokens
    k_nope, k_rope = load_parts(key + row[:, None] * size, inside, nope, rope)
    values = tl.load(value + row[:, None] * width + v[None, :], mask=inside, other=0.0)
    grad_nope = tl.zeros((block_n, nope), tl.float32)
    grad_rope = tl.zeros((block_n, rope), tl.float32)
    grad_values = tl.zeros((block_n, width), tl.float32)
    for i in range(heads_per_key):
        query_rows = (first_head + i).to(tl.int64) * tokens
        for start in range(first // block_m * block_m, tokens, block_m):
            m = start + tl.arange(0, block_m)
            query_row = query_rows + m
            there = m[:, None] < tokens
            q_nope, q_rope = load_parts(query + query_row[:, None] * size, there, nope, rope)
            g = tl.load(grad + query_row[:, None] * width + v[None, :], mask=there, other=0.0)
            logs = tl.load(log_sum + query_row, mask=m < tokens, other=0.0)
            summed = tl.load(row_sum + query_row, mask=m < tokens, other=0.0)
            scores = scores_of(k_nope, k_rope, q_nope, q_rope, scale)
            seen = (place[:, None] <= m[None, :]) & (m[None, :] < tokens)
            weights = tl.where(seen, tl.exp(scores - logs[None, :]), 0.0)
            grad_values += dot(rounded(weights, g.dtype), g)
            grad_scores = rounded(weights * (dot(values, tl.trans(g)) - summed[None, :]) * scale, q_nope.dtype)
            grad_nope += dot(grad_scores, q_nope)
            grad_rope += dot(grad_scores, q_rope)
    store_parts(grad_key + row[:, None] * size, inside, grad_nope, grad_rope, nope, rope)
    tl.store(grad_value + row[:, None] * width + v[None, :], rounded(grad_values, grad_value.dtype.element_ty), mask=inside)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, rope: int = 0) -> Tensor:
    """As `finback.ops.attention.causal_attention` without a mask: query [B, H, T, N + R], key [B, H / G, T, N + R], value
    [B, H / G, T, V] -> [B, H, T, V]. `rope` is R (0: half of the head counts as R); N, R and V must be powers of two of at least 16.
    """
    nope = query.shape[-1] - rope if rope else query.shape[-1] // 2
    rope = query.shape[-1] - nope
    width = value.shape[-1]
    if any(part < 16 or triton.next_power_of_2(part) != part for part in (nope, rope, width)):
        raise ValueError(f"the prefill kernel needs powers of two of at least 16, not heads of {nope} + {rope} and {width}")
    result: Tensor = _CausalAttention.apply(query, key, value, scale, nope)
    return result


class _CausalAttention(torch.autograd.Function):
    """Keeps its inputs, its output and a logarithm for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, nope: int) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        batch, heads, tokens, size = query.shape
        out = torch.empty(batch, heads, tokens, value.shape[-1], dtype=query.dtype, device=query.device)
        log_sum = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
        if out.numel():
            forward_kernel[(triton.cdiv(tokens, _BLOCK), batch * heads)](
                query, key, value, out, log_sum, tokens, heads, heads // key.shape[1], scale, nope, size - nope, value.shape[-1],
                _BLOCK, _BLOCK, num_warps=4, num_stages=2,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.scale, ctx.nope = scale, nope
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_sum = ctx.saved_tensors
        batch, heads, tokens, size = query.shape
        grad = grad.contiguous()
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        row_sum = torch.empty_like(log_sum)
        sizes = ctx.nope, size - ctx.nope, value.shape[-1], _BLOCK, _BLOCK
        rest = tokens, heads, heads // key.shape[1], ctx.scale, *sizes
        blocks = triton.cdiv(tokens, _BLOCK)
        if out.numel():
            query_gradient_kernel[(blocks, batch * heads)](
                query, key, value, out, log_sum, grad, grads[0], row_sum, *rest, num_warps=8, num_stages=2
            )
            key_gradient_kernel[(blocks, batch * key.shape[1])](
                query, key, value, log_sum, row_sum, grad, grads[1], grads[2], *rest, num_warps=8, num_stages=1
            )
        return *grads, None, None
