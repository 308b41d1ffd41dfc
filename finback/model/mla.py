"""Multi-head latent attention (V3 section 2.1.1): two forward paths over one set of weights.

*Expanded* (training, prefill) multiplies the latent out to keys and values per head. *Absorbed* (decode) folds the up-projection of
the keys into the query and that of the values into the output, and attends straight to the cached rows of `kv_lora_rank +
qk_rope_head_dim` values: the normalised latent, then the rotated key that all heads share.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finback.config import ModelConfig
from finback.model.layers import Linear, RMSNorm
from finback.model.recompute import rebuilt
from finback.ops.attention import Attend, causal_attention, latent_attention
from finback.ops.products import bmm
from finback.ops.rotary import apply_rotary, softmax_scale

LATENT_NORM_EPS = 1e-6  # the published code fixes it for both latent norms, whatever rms_norm_eps says


class Rotary(NamedTuple):
    """cos and sin of the positions at hand, [T, R / 2] or [B, T, R / 2], float32."""

    cos: Tensor
    sin: Tensor


class MLA(nn.Module):
    """Multi-head latent attention. Weight names and row orders are the published ones: per head nope before rope in the query,
    key before value in `kv_b_proj`; latent before rope key in `kv_a_proj_with_mqa`."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        c = config
        self.num_heads = c.num_attention_heads
        self.nope_dim, self.rope_dim, self.value_dim = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.kv_lora_rank = c.kv_lora_rank
        self.scale = softmax_scale(c)
        query_width = c.num_attention_heads * c.qk_head_dim
        self.q_proj = None
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, query_width, device, dtype)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, device, dtype)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, device, dtype)
            self.q_b_proj = Linear(c.q_lora_rank, query_width, device, dtype)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, device, dtype)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, device, dtype)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), device, dtype)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, device, dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: Rotary,
        attend: Attend = causal_attention,
        recompute: bool = False,
    ) -> Float[Tensor, "B T D"]:
        """The expanded path over whole sequences. With `recompute`, q, k, v and the normalised latents are rebuilt in backward."""
        compressed_query = x if self.q_proj is not None else self.q_a_proj(x)
        compressed = self.kv_a_proj_with_mqa(x)

        def expand() -> tuple[Tensor, Tensor, Tensor]:
            query = self._query(compressed_query, rotary, recompute).transpose(1, 2)
            latent, rope_key = self._latent(compressed, rotary)
            with rebuilt((latent,), lambda: (self._latent(compressed, rotary)[0],), recompute):
                return query, *self._expand(latent, rope_key)

        query, key, value = expand()
        with rebuilt((query, key, value), expand, recompute):
            heads = attend(query, key, value, self.scale)
        return self._output(heads.transpose(1, 2))

    def cache_rows(self, x: Float[Tensor, "B T D"], rotary: Rotary) -> Float[Tensor, "B T C_R"]:
        """What is cached for each token: the normalised latent, then the rotated shared key."""
        latent, rope_key = self._latent(self.kv_a_proj_with_mqa(x), rotary)
        return torch.cat((latent, rope_key), dim=-1)

    def attend_expanded(
        self, x: Float[Tensor, "B T D"], rows: Float[Tensor, "B S C_R"], rotary: Rotary, mask: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        """Attend from x to cached rows by expanding them: cheaper than absorbing for many query tokens (prefill)."""
        latent, rope_key = rows.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        query = self._query(x if self.q_proj is not None else self.q_a_proj(x), rotary).transpose(1, 2)
        key, value = self._expand(latent, rope_key)
        return self._output(causal_attention(query, key, value, self.scale, mask).transpose(1, 2))

    def attend_absorbed(
        self, x: Float[Tensor, "B T D"], rows: Float[Tensor, "B S C_R"], rotary: Rotary, mask: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        """Attend from x to cached rows as they are (V3 inference, "MQA mode"): no per-head keys or values are ever built."""
        batch, tokens = x.shape[:2]
        query = self._query(x if self.q_proj is not None else self.q_a_proj(x), rotary).flatten(0, 1)
        key_up, value_up = self.absorbed_weights()
        nope, rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        latent_query = bmm(nope.transpose(0, 1), key_up).transpose(0, 1)  # [B T, H, C]
        queries = torch.cat((latent_query, rope), dim=-1).view(batch, tokens, self.num_heads, -1)
        latent = latent_attention(queries, rows, self.kv_lora_rank, self.scale, mask).flatten(0, 1)
        heads = bmm(latent.transpose(0, 1), value_up.transpose(1, 2)).transpose(0, 1)
        return self._output(heads.reshape(batch, tokens, self.num_heads, self.value_dim))

    def absorbed_weights(self) -> tuple[Tensor, Tensor]:
        """Views of `kv_b_proj`: the key part [H, N, C] and the value part [H, V, C]."""
        weight = self.kv_b_proj.weight.view(self.num_heads, self.nope_dim + self.value_dim, self.kv_lora_rank)
        key_up, value_up = weight.split([self.nope_dim, self.value_dim], dim=1)
        return key_up, value_up

    def _query(self, compressed: Tensor, rotary: Rotary, recompute: bool = False) -> Tensor:
        """[B, T, Q], or x itself without query compression -> rotated queries [B, T, H, N + R]."""
        if self.q_proj is not None:
            flat = self.q_proj(compressed)
        else:
            normalised = self.q_a_layernorm(compressed)
            with rebuilt((normalised,), lambda: (self.q_a_layernorm(compressed),), recompute):
                flat = self.q_b_proj(normalised)
        query = flat.view(*flat.shape[:2], self.num_heads, self.nope_dim + self.rope_dim)
        nope, rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        rotated = apply_rotary(rope, rotary.cos.unsqueeze(-2), rotary.sin.unsqueeze(-2))
        return torch.cat((nope, rotated), dim=-1)

    def _latent(self, compressed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """[B, T, C + R] -> normalised latent [B, T, C] and rotated shared key [B, T, R]; the key is not normalised."""
        latent, rope_key = compressed.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        return self.kv_a_layernorm(latent), apply_rotary(rope_key, rotary.cos, rotary.sin)

    def _expand(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, C], [B, S, R] -> keys [B, H, S, N + R] and values [B, H, S, V], in memory with their heads behind tokens."""
        expanded = self.kv_b_proj(latent).view(*latent.shape[:2], self.num_heads, self.nope_dim + self.value_dim)
        nope, value = expanded.split([self.nope_dim, self.value_dim], dim=-1)
        shared = rope_key.to(nope.dtype).unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        # Values are copied so that what is kept for the backward pass holds no second copy of the keys.
        return torch.cat((nope, shared), dim=-1).transpose(1, 2), value.contiguous().transpose(1, 2)

    def _output(self, heads: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, D]."""
        output: Tensor = self.o_proj(heads.flatten(2))
        return output
