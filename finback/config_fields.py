"""What the modules of the room `config` share: errors, rotary scaling, the families of models, and how one JSON value is read."""

import difflib
import math
from dataclasses import dataclass
from typing import Any


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names the field or file, the value and the remedy."""


def nearest(name: str, valid: list[str]) -> str:
    """The closest valid name as a hint to append to an error, or an empty string."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (V3 section 4.3, V2 section 3.1.4), applied to the decoupled rotary dimensions only; in dense models to whole heads.

    `mscale` and `mscale_all_dim` are None where the file does not give them: the softmax scale is then left alone, and cos and
    sin are multiplied by 0.1 ln(factor) + 1 instead, which is what the published code does.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        _check_scaling(self.factor, self.original_max_position_embeddings)
        if not self.beta_slow < self.beta_fast < math.inf:
            raise InputError(
                f"config field rope_scaling.beta_fast is {self.beta_fast}, it must be larger than beta_slow ({self.beta_slow})"
            )


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The scaling of Llama 3.1 and later: pairs that turn less than `low_freq_factor` times over the original context are slowed
    by `factor`, those above `high_freq_factor` stay, and between the two it is blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_scaling(self.factor, self.original_max_position_embeddings)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"config field rope_scaling.low_freq_factor is {self.low_freq_factor}, it must be above 0 and below "
                f"high_freq_factor ({self.high_freq_factor})"
            )


def _check_scaling(factor: float, original: int) -> None:
    if not 1 <= factor < math.inf:
        raise InputError(f"config field rope_scaling.factor is {factor}, it must be at least 1 and finite")
    if original < 1:
        raise InputError(f"config field rope_scaling.original_max_position_embeddings is {original}, it must be positive")


ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DENSE_FAMILIES = ("llama", "qwen2", "qwen3")  # grouped-query attention, no experts, no multi-token prediction

# Fields of config.json that are read into ModelConfig under their own name: of every family, of DeepSeek's, of the dense ones.
COMMON_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# fmt: off
DEEPSEEK_INTEGERS = (
    "moe_intermediate_size", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "first_k_dense_replace", "num_nextn_predict_layers", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)
# fmt: on
DENSE_INTEGERS = ("num_key_value_heads", "head_dim")
NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range", "rope_theta")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = ("bfloat16", "float32", "float16")
FP8_BLOCK = 128  # rows and columns that share one scale in DeepSeek's FP8 layout


def read_integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"config field {name} is {value!r}, it must be a whole number")
    return value


def read_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"config field {name} is {value!r}, it must be a finite number")
    return float(value)


def read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"config field {name} is {value!r}, it must be true or false")
    return value


def read_token_id(name: str, value: Any) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    if name == "eos_token_id" and isinstance(value, list):
        return tuple(read_integer(name, item) for item in value)
    return read_integer(name, value)
