"""Rotary position embedding in DeepSeek's interleaved layout and the dense families' half-split one, with YaRN (V3 section 4.3, V2
section 3.1.4) and Llama 3.1's scaling."""

import math

import torch
from torch import Tensor

from finback.config import Llama3RopeScaling, ModelConfig, RopeScaling
from finback.ops.precision import wide


def rotary_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for integer `positions` [...]: two float32 tensors [..., R / 2], YaRN's factor on them included."""
    frequencies = inverse_frequencies(config).to(positions.device)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    scale = yarn_table_scale(config.rope_scaling)
    return angles.cos() * scale, angles.sin() * scale


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """theta^(-2i/R) for i < R/2, with YaRN or Llama 3.1's scaling the low frequencies divided by the factor: float32 [R / 2]."""
    dim = config.rotary_dim
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, Llama3RopeScaling):
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
        low_turns, high_turns = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low_turns) / (high_turns - low_turns)).clamp(0, 1)
        return frequencies / scaling.factor * (1 - kept) + frequencies * kept
    original = scaling.original_max_position_embeddings
    low, high = (_correction_dim(turns, dim, original, config.rope_theta) for turns in (scaling.beta_fast, scaling.beta_slow))
    first, last = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    width = last - first if last != first else 0.001  # the published guard against a zero-width ramp
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _correction_dim(turns: float, dim: int, original: int, theta: float) -> float:
    """The (fractional) rotary pair that makes `turns` full turns over the original context."""
    return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1: V3's sqrt(t) with mscale 1, V2's 0.0707 ln s + 1 with mscale 0.707."""
    return 0.1 * mscale * math.log(factor) + 1.0


def yarn_table_scale(scaling: RopeScaling | Llama3RopeScaling | None) -> float:
    """The factor on cos and sin: 1 in every released DeepSeek config, because mscale equals mscale_all_dim there."""
    if scaling is None or isinstance(scaling, Llama3RopeScaling):
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """(N + R)^-0.5, in MLA times the square of YaRN's mscale where the config asks for it (`mscale_all_dim`)."""
    scale: float = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if config.kv_lora_rank and isinstance(scaling, RopeScaling) and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3), ... of x [..., R] by angles given as cos, sin [..., R / 2] (broadcast).

    Computed in float32, returned in x's dtype.
    """
    pairs = torch.view_as_complex(x.to(wide(x.dtype)).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin).to(pairs.dtype)).flatten(-2).to(x.dtype)


def apply_rotary_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for the pairs (x0, xR/2), (x1, xR/2+1), ...: the layout of Llama and Qwen as Hugging Face stores them.

    Computed in float32, returned in x's dtype.
    """
    first, second = x.to(wide(x.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
