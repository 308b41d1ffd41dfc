"""Attention over expanded keys and values, with a head each or one for a group of queries, and over the latent cache (V3 section
2.1.1)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.build import causal_kernels_for, training_kernels_for
from finback.ops.native.causal import CausalKernels
from finback.ops.precision import wide
from finback.ops.products import bmm, widened

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention of a layer's heads to those of the tokens it may see: query, key, value and scale, as `causal_attention` takes them."""

_QUERY_BLOCK = 128  # queries per block: later keys are never multiplied
_SCORES_ALIVE = 1 << 19  # scores alive at a time on a CPU, so that they stay in its cache


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v: query, key [B, H, T, N + R], value [B, H, T, V] -> [B, H, T, V].

    Keys and values may have fewer heads [B, H / G, ...]: each then serves G consecutive query heads (grouped-query attention).
    Causal over equally many queries and keys; or, with `mask` (bool, True where a query may look, broadcastable to [B, H, T, S]),
    exactly that. On a CPU in bfloat16 scores are rounded to bfloat16 before the softmax, as in the plain formula; one that multiplies
    bfloat16 slowly does all of it in float32, and keeps it in bfloat16.
    """
    assert mask is not None or query.shape[2] == key.shape[2], "without a mask, queries and keys are the same tokens"
    if mask is None and query.device.type == "cpu":
        kernels = causal_kernels_for(query, key, value)
        if kernels is None:
            return blocked_attention(query, key, value, scale)
        if not torch.is_grad_enabled():
            return kernels.attention(query, key, value, scale)
        result: Tensor = _NativeAttention.apply(query, key, value, scale)
        return result
    return attention_reference(query, key, value, scale, mask)


class _NativeAttention(torch.autograd.Function):
    """Keeps q, k and v only, as `_BlockedAttention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return _kernels(query, key, value).attention(query, key, value, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors
        return *_kernels(*saved).backward(grad, *saved, ctx.scale), None


def _kernels(query: Tensor, key: Tensor, value: Tensor) -> CausalKernels:
    kernels = causal_kernels_for(query, key, value)
    assert kernels is not None, "they were there a moment ago"
    return kernels


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same on a CPU by torch's products, a block of queries after the other: twice the speed of the CPU's fused kernel, which also
    refuses unequal head sizes."""
    if not torch.is_grad_enabled():
        return _blocked_forward(query, key, value, scale)
    result: Tensor = _BlockedAttention.apply(query, key, value, scale)
    return result


def attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The same by torch's own kernel. Heads of unequal size are padded with zeros, or the CPU would build B x H x T x T."""
    grouped = query.shape[1] != key.shape[1]
    width = value.shape[-1]
    pad = key.shape[-1] - width
    if pad > 0:
        value = F.pad(value, (0, pad))
    elif pad < 0:  # zeros add nothing to q.k
        query, key = F.pad(query, (0, -pad)), F.pad(key, (0, -pad))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return output[..., :width]


def _blocks(heads: int, per_key: int, tokens: int) -> Iterator[tuple[slice, int, int]]:
    """(key heads, first query, end) of each block; a block looks at keys [0, end). `per_key` query heads share a key head."""
    for start in range(0, tokens, _QUERY_BLOCK):
        end = min(tokens, start + _QUERY_BLOCK)
        together = max(1, _SCORES_ALIVE // ((end - start) * end * per_key))
        for first in range(0, heads, together):
            yield slice(first, min(heads, first + together)), start, end


def _block_weights(query: Tensor, key: Tensor, start: int, end: int, scale: float) -> Tensor:
    """softmax(scale q k^T) of one block, causal: query [h, G (end - start), d], the rows of a group of heads one head after the
    other, each from position `start` on, key [h, end, d] -> [h, G (end - start), end].

    On a CPU the softmax is one pass in C, if there is a compiler; `causal_weights` is the twin.
    """
    kernels = training_kernels_for(query)
    if kernels is None:
        return causal_weights(query, key, start, end, scale)
    scores = torch.bmm(query, key.transpose(1, 2))
    kernels.causal_softmax(scores.view(-1, end - start, end), start, scale)
    return scores


def causal_weights(query: Tensor, key: Tensor, start: int, end: int, scale: float) -> Tensor:
    """The same with torch alone."""
    bias = query.new_full((end - start, end), float("-inf")).triu_(start + 1).repeat(query.shape[1] // (end - start), 1)
    return torch.baddbmm(bias.expand(query.shape[0], -1, -1), query, key.transpose(1, 2), alpha=scale).softmax(-1)


def _block_grad_scores(grad: Tensor, weights: Tensor, start: int, end: int, scale: float) -> Tensor:
    """The gradient of a block's scores from that of its weights, which it may overwrite."""
    kernels = training_kernels_for(grad, weights)
    if kernels is None:
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)
    kernels.causal_softmax_backward(grad.view(-1, end - start, end), weights.view(-1, end - start, end), start, scale)
    return grad


def _grouped(heads: Tensor, key: Tensor) -> Tensor:
    """[B, H, T, d] -> [B H / G, G, T, d], G being the query heads of one head of `key`."""
    return heads.reshape(key.shape[0] * key.shape[1], -1, *heads.shape[2:])


def _blocked_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if widened(query, key, value):
        with torch.autocast("cpu", enabled=False):
            return _blocked_forward(query.float(), key.float(), value.float(), scale).bfloat16()
    k, v = key.flatten(0, 1), value.flatten(0, 1)
    q = _grouped(query, key)
    output = q.new_empty(*q.shape[:3], v.shape[-1])
    for heads, start, end in _blocks(*q.shape[:3]):
        block = output[heads, :, start:end]
        weights = _block_weights(q[heads, :, start:end].flatten(1, 2), k[heads, :end], start, end, scale)
        block.copy_(torch.bmm(weights, v[heads, :end]).view_as(block))
    return output.view(*query.shape[:3], -1)


class _BlockedAttention(torch.autograd.Function):
    """Keeps q, k and v only; backward makes the weights of one block again and goes through the softmax once."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return _blocked_forward(query, key, value, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors
        if not widened(*saved):
            return *_blocked_backward(grad, *saved, ctx.scale), None
        query, key, value = (t.float() for t in saved)
        grad_q, grad_k, grad_v = _blocked_backward(grad.float(), query, key, value, ctx.scale)
        return grad_q.bfloat16(), grad_k.bfloat16(), grad_v.bfloat16(), None


def _blocked_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    k, v = key.flatten(0, 1), value.flatten(0, 1)
    q, g = _grouped(query, key), _grouped(grad, key)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for heads, start, end in _blocks(*q.shape[:3]):
        queries, grads = (t[heads, :, start:end].flatten(1, 2) for t in (q, g))
        keys = k[heads, :end]
        weights = _block_weights(queries, keys, start, end, scale)
        grad_v[heads, :end] += torch.bmm(weights.transpose(1, 2), grads)
        grad_weights = torch.bmm(grads, v[heads, :end].transpose(1, 2))
        grad_scores = _block_grad_scores(grad_weights, weights, start, end, scale)
        block = grad_q[heads, :, start:end]
        block.copy_(torch.bmm(grad_scores, keys).view_as(block))
        grad_k[heads, :end] += torch.bmm(grad_scores.transpose(1, 2), queries)
    return grad_q.view_as(query), grad_k.view_as(key), grad_v.view_as(value)


def latent_attention(query: Tensor, latents: Tensor, rank: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """Absorbed ("MQA mode") attention: every head attends to the same cached row, whose first `rank` values are also the value.

    query [B, T, H, C + R], latents [B, S, C + R] -> [B, T, H, C]; mask bool broadcastable to [B, T, H, S], True where a query may
    look. The softmax is float32.
    """
    batch, tokens, heads, width = query.shape
    scores = bmm(query.reshape(batch, tokens * heads, width), latents.transpose(1, 2))
    scores = scores.view(batch, tokens, heads, -1).to(wide(latents.dtype)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).to(latents.dtype)
    return bmm(weights.view(batch, tokens * heads, -1), latents[..., :rank]).view(batch, tokens, heads, rank)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention of a few tokens over cached rows, keys and values read once for all heads that share them.

    query [B, T, H, d], key, value [B, S, H / G, d] (views of the cache do) -> [B, T, H, d]; mask bool broadcastable to [B, H, T, S],
    True where a query may look. The softmax is float32.
    """
    batch, tokens, heads, width = query.shape
    shared = key.shape[2]
    queries = query.view(batch, tokens, shared, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, H / G, G T, d]
    scores = torch.matmul(queries, key.permute(0, 2, 3, 1)).view(batch, heads, tokens, -1).to(wide(key.dtype)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).to(value.dtype).view(batch, shared, -1, key.shape[1])
    output = torch.matmul(weights, value.transpose(1, 2)).view(batch, heads, tokens, width)
    return output.transpose(1, 2)


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal mask that also hides other documents: document_ids [B, T] -> bool [B, 1, T, T] (sample masking, V3 section 5.1)."""
    tokens = document_ids.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :])).unsqueeze(1)
