"""Grouped-query attention of the dense students: Llama, Qwen2 (biases on query, key and value) and Qwen3 (RMSNorm over each head's
query and key). Cached is one row per token: the rotated keys of all key-value heads, then their values."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finback.config import ModelConfig
from finback.model.layers import Linear, RMSNorm
from finback.model.mla import Rotary
from finback.model.recompute import rebuilt
from finback.ops.attention import Attend, causal_attention, grouped_attention
from finback.ops.rotary import apply_rotary_halves, softmax_scale


class GQA(nn.Module):
    """Grouped-query attention with the names and row orders of the Hugging Face files: rotary pairs are the halves of a head."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.scale = softmax_scale(c)
        query_width, key_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query_width, device, dtype, bias=c.attention_bias)
        self.k_proj = Linear(c.hidden_size, key_width, device, dtype, bias=c.attention_bias)
        self.v_proj = Linear(c.hidden_size, key_width, device, dtype, bias=c.attention_bias)
        self.o_proj = Linear(query_width, c.hidden_size, device, dtype, bias=c.uses_output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, device, dtype) if c.uses_qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, device, dtype) if c.uses_qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: Rotary,
        attend: Attend = causal_attention,
        recompute: bool = False,
    ) -> Float[Tensor, "B T D"]:
        """Whole sequences. With `recompute`, Qwen3's normalised and rotated queries and keys are rebuilt in backward from the
        projections that their norms keep; the other families keep nothing twice."""
        flat_query, flat_key = self.q_proj(x), self.k_proj(x)
        value = self._heads(self.v_proj(x)).transpose(1, 2)

        def rotate() -> tuple[Tensor, Tensor]:
            query, key = self._rotated(flat_query, self.q_norm, rotary), self._rotated(flat_key, self.k_norm, rotary)
            return query.transpose(1, 2), key.transpose(1, 2)

        query, key = rotate()
        with rebuilt((query, key), rotate, recompute and self.q_norm is not None):
            heads = attend(query, key, value, self.scale)
        return self._output(heads.transpose(1, 2))

    def cache_rows(self, x: Float[Tensor, "B T D"], rotary: Rotary) -> Float[Tensor, "B T W"]:
        """What is cached for each token: the keys of all heads, normalised and rotated, then the values."""
        key = self._rotated(self.k_proj(x), self.k_norm, rotary)
        return torch.cat((key.flatten(2), self.v_proj(x)), dim=-1)

    def attend(
        self, x: Float[Tensor, "B T D"], rows: Float[Tensor, "B S W"], rotary: Rotary, mask: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        """Attend from x to cached rows; `mask` is bool, broadcastable to [B, H, T, S]. Without one, equally many tokens and rows are
        the same tokens and attention is causal; a single token looks at every row."""
        key, value = (self._heads(part) for part in rows.chunk(2, dim=-1))
        query = self._rotated(self.q_proj(x), self.q_norm, rotary)
        tokens = x.shape[1]
        if mask is None and tokens == rows.shape[1] > 1:
            heads = causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.scale)
            return self._output(heads.transpose(1, 2))
        assert mask is not None or tokens == 1, "several tokens over more rows than themselves need a mask"
        return self._output(grouped_attention(query, key, value, self.scale, mask))

    def _heads(self, flat: Tensor) -> Tensor:
        """[B, T, h d] -> [B, T, h, d]."""
        return flat.view(*flat.shape[:2], -1, self.head_dim)

    def _rotated(self, flat: Tensor, norm: RMSNorm | None, rotary: Rotary) -> Tensor:
        """[B, T, h d] -> heads [B, T, h, d], normalised where the family does, and rotated."""
        heads = self._heads(flat)
        if norm is not None:
            heads = norm(heads)
        return apply_rotary_halves(heads, rotary.cos.unsqueeze(-2), rotary.sin.unsqueeze(-2))

    def _output(self, heads: Tensor) -> Tensor:
        """[B, T, H, d] -> [B, T, D]."""
        output: Tensor = self.o_proj(heads.flatten(2))
        return output
