"""Attention over expanded keys and values, and over the latent cache (V3 section 2.1.1)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v: query, key [B, H, T, N + R], value [B, H, T, V] -> [B, H, T, V].

    Causal; or, with `mask` (bool, True where a query may look, broadcastable to [B, H, T, S]), exactly that.
    The CPU's fused kernel refuses unequal head sizes and would silently build B x H x T x T: values are padded to the key's width.
    """
    width = value.shape[-1]
    pad = key.shape[-1] - width
    if pad > 0:
        value = F.pad(value, (0, pad))
    elif pad < 0:  # zeros add nothing to q.k
        query, key = F.pad(query, (0, -pad)), F.pad(key, (0, -pad))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return output[..., :width] if pad > 0 else output


def latent_attention(query: Tensor, latents: Tensor, rank: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """Absorbed ("MQA mode") attention: every head attends to the same cached row, whose first `rank` values are also the value.

    query [B, T, H, C + R], latents [B, S, C + R] -> [B, T, H, C]; mask bool broadcastable to [B, T, H, S], True where a query may
    look. Scores and softmax are float32, as in the expanded path.
    """
    batch, tokens, heads, width = query.shape
    scores = torch.bmm(query.reshape(batch, tokens * heads, width), latents.transpose(1, 2))
    scores = scores.view(batch, tokens, heads, -1).to(torch.float32) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).to(latents.dtype)
    return torch.bmm(weights.view(batch, tokens * heads, -1), latents[..., :rank]).view(batch, tokens, heads, rank)


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal mask that also hides other documents: document_ids [B, T] -> bool [B, 1, T, T] (sample masking, V3 section 5.1)."""
    tokens = document_ids.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=document_ids.device).tril()
    return (causal & (document_ids[:, :, None] == document_ids[:, None, :])).unsqueeze(1)
