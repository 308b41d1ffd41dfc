"""The model's configuration, exactly as it is published, and what follows from it by arithmetic alone.

`ModelConfig` reads every published form of `config.json` of DeepSeek V2, V2-Lite, V3 and R1, of the dense Llama, Qwen2 and Qwen3, and
what `transformers` writes back (`config_json.py`), and writes the published one. Parameter counts and the table of checkpoint
tensors are formulas over it: nothing here allocates, and nothing here imports torch.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from finback.config_fields import (
    ARCHITECTURES,
    COMMON_INTEGERS,
    DEEPSEEK_INTEGERS,
    DENSE_FAMILIES,
    DENSE_INTEGERS,
    DTYPES,
    FP8_BLOCK,
    NUMBERS,
    TOKEN_IDS,
    InputError,
    Llama3RopeScaling,
    RopeScaling,
    nearest,
)
from finback.config_json import read_config

__all__ = [
    "DTYPE_BYTES",
    "FP8_BLOCK",
    "InputError",
    "Llama3RopeScaling",
    "ModelConfig",
    "ParamCounts",
    "RopeScaling",
    "TensorSpec",
    "checkpoint_tensors",
    "count_params",
    "nearest",
]

_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")
_ROUTING = {
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True, False)},
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        # transformers ignores the field for V2, and V2's own code then skips the scaling factor: two computations, neither released.
        "norm_topk_prob": (False,),
    },
}


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V2/V3 model, or a dense Llama, Qwen2 or Qwen3. Field names are those of the published `config.json`, defaults V3's.

    A dense model has `kv_lora_rank` 0, which means grouped-query attention, and `n_routed_experts` 0: every layer is dense, and
    `first_k_dense_replace` follows `num_hidden_layers`. `num_key_value_heads` and `head_dim` are derived where they are 0.
    `fp8` is true where the file's `quantization_config` says that weights are stored as E4M3 in 128x128 blocks.
    Raises InputError for values that contradict each other or that no supported computation matches.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | Llama3RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    torch_dtype: str = "float32"
    model_type: str = "deepseek_v3"
    fp8: bool = False

    def __post_init__(self) -> None:
        for name, value in _derived(self).items():
            object.__setattr__(self, name, value)
        _check_config(self)

    @property
    def qk_head_dim(self) -> int:
        """Values in one head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Values in one head that rotary embedding turns."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def cache_row_width(self) -> int:
        """Values cached per token and layer: MLA's latent and shared key, or keys and values of all key-value heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim if self.kv_lora_rank else 2 * self.num_key_value_heads * self.head_dim

    @property
    def uses_output_bias(self) -> bool:
        """`o_proj` has a bias too where `attention_bias` says so; Qwen2's biases are on query, key and value only."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def uses_qk_norm(self) -> bool:
        """Qwen3 normalises each head's query and key before rotation."""
        return self.model_type == "qwen3"

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model with routed experts; each MTP layer has one more router."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def uses_expert_bias(self) -> bool:
        """Auxiliary-loss-free balancing (V3 section 2.1.2): the router carries `e_score_correction_bias`."""
        return self.topk_method == "noaux_tc" and self.n_routed_experts > 0

    @classmethod
    def from_hf(cls, directory: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face directory."""
        path = Path(directory) / "config.json"
        if not Path(directory).is_dir():
            raise InputError(f"{directory} is not a directory; give one that holds config.json and *.safetensors")
        if not path.is_file():
            raise InputError(f"{directory} holds no config.json; give a Hugging Face model directory")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path} is not JSON ({error}); restore the file") from None
        if not isinstance(data, dict):
            raise InputError(f"{path} holds {type(data).__name__}, not a JSON object; restore the file")
        if isinstance(data.get("model"), dict | str) and "model_type" not in data:
            raise InputError(
                f"{directory} is the directory of a run; give one of its models, such as {directory}/checkpoints/step-N"
            )
        try:
            return cls.from_dict(data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Read any published form of `config.json` (see the module docstring)."""
        return cls(**read_config(data, [f.name for f in fields(cls)]))

    def to_dict(self) -> dict[str, Any]:
        """The published form of `config.json`, which transformers, vLLM and SGLang read."""
        dense = self.model_type in DENSE_FAMILIES
        published: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "use_cache": True,
        }
        names = [f.name for f in fields(self) if f.name not in ("rope_scaling", "fp8", "pad_token_id")]
        if dense:
            names = [name for name in names if name not in _DEEPSEEK_ONLY]
        else:
            names.remove("head_dim")
            published["moe_layer_freq"] = 1
        if self.model_type == "deepseek_v2" and not self.num_nextn_predict_layers:
            names.remove("num_nextn_predict_layers")
        published |= {name: getattr(self, name) for name in names}
        published["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        if self.pad_token_id is not None:
            published["pad_token_id"] = self.pad_token_id
        if self.model_type == "llama":
            published["mlp_bias"] = False
        if self.model_type == "qwen2":
            del published["attention_bias"]
        if self.model_type in ("qwen2", "qwen3"):
            published["use_sliding_window"] = False
        published["rope_scaling"] = None
        if self.rope_scaling is not None:
            scaling = {f.name: getattr(self.rope_scaling, f.name) for f in fields(self.rope_scaling)}
            kind = {"rope_type": "llama3"} if isinstance(self.rope_scaling, Llama3RopeScaling) else {"type": "yarn"}
            published["rope_scaling"] = {k: v for k, v in scaling.items() if v is not None} | kind
        if self.fp8:
            published["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            }
        return dict(sorted(published.items()))


# What a dense model's file does not hold, and neither does its computation.
_DEEPSEEK_ONLY = (
    *DEEPSEEK_INTEGERS,
    "q_lora_rank",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
    "norm_topk_prob",
)


def _derived(c: ModelConfig) -> dict[str, int]:
    """Fields that follow from others: all in a DeepSeek model, where `num_key_value_heads` is published but says nothing; in a
    dense one what belongs to experts, and the two sizes that its file may leave out."""
    if c.model_type not in DENSE_FAMILIES:
        return {"num_key_value_heads": c.num_attention_heads}
    derived = {"first_k_dense_replace": c.num_hidden_layers, "n_shared_experts": 0}
    if c.num_key_value_heads == 0:
        derived["num_key_value_heads"] = c.num_attention_heads
    if c.head_dim == 0 and c.num_attention_heads > 0:
        derived["head_dim"] = c.hidden_size // c.num_attention_heads
    return derived


def _check_config(c: ModelConfig) -> None:
    if c.model_type not in ARCHITECTURES:
        raise InputError(f"config field model_type is {c.model_type!r}, supported are {', '.join(ARCHITECTURES)}")
    dense = c.model_type in DENSE_FAMILIES
    for name in (*COMMON_INTEGERS, *(DENSE_INTEGERS if dense else DEEPSEEK_INTEGERS)):
        value, least = getattr(c, name), 0 if name in _MAY_BE_ZERO else 1
        if value < least:
            raise InputError(f"config field {name} is {value}, it must be at least {least}")
    for name in NUMBERS:
        if not 0 < getattr(c, name) < math.inf:
            raise InputError(f"config field {name} is {getattr(c, name)}, it must be positive and finite")
    if c.torch_dtype not in DTYPES:
        raise InputError(f"config field torch_dtype is {c.torch_dtype!r}, supported are {', '.join(DTYPES)}")
    if dense:
        _check_dense(c)
    else:
        _check_deepseek(c)
    for name in TOKEN_IDS:
        value = getattr(c, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < c.vocab_size:
                raise InputError(f"config field {name} is {token}, outside vocab_size ({c.vocab_size})")


def _check_dense(c: ModelConfig) -> None:
    for name in DEEPSEEK_INTEGERS:
        value = getattr(c, name)
        if value != 0 and name not in ("first_k_dense_replace", "n_group", "topk_group"):
            raise InputError(f"config field {name} is {value}, but {c.model_type} is a dense model without it; use 0")
    if c.q_lora_rank is not None:
        raise InputError(f"config field q_lora_rank is {c.q_lora_rank}, but {c.model_type} is a dense model without it; use null")
    if c.model_type == "llama" and c.hidden_size % c.num_attention_heads:  # transformers refuses it
        heads = c.num_attention_heads
        raise InputError(f"config field hidden_size is {c.hidden_size}, it must be a multiple of num_attention_heads ({heads})")
    if c.head_dim % 2:
        raise InputError(f"config field head_dim is {c.head_dim}, it must be even: rotary pairs")
    if c.num_attention_heads % c.num_key_value_heads:
        heads = c.num_key_value_heads
        raise InputError(
            f"config field num_key_value_heads is {heads}, it must divide num_attention_heads ({c.num_attention_heads})"
        )
    if c.model_type == "qwen2" and not c.attention_bias:
        raise InputError("config field attention_bias is False, but qwen2 always has query, key and value biases; use True")


def _check_deepseek(c: ModelConfig) -> None:
    for name in ("attention_bias", "tie_word_embeddings", "head_dim"):
        value = getattr(c, name)
        if value:
            raise InputError(f"config field {name} is {value}, which {c.model_type} does not have; use {type(value)()}")
    if isinstance(c.rope_scaling, Llama3RopeScaling):
        raise InputError(f"config field rope_scaling is Llama's, {c.model_type} supports YaRN; use RopeScaling")
    if c.q_lora_rank is not None and c.q_lora_rank < 1:
        raise InputError(f"config field q_lora_rank is {c.q_lora_rank}, it must be positive, or null for no query compression")
    for name, allowed in _ROUTING[c.model_type].items():
        if getattr(c, name) not in allowed:
            raise InputError(
                f"config field {name} is {getattr(c, name)!r}, {c.model_type} supports {' or '.join(map(repr, allowed))}"
            )
    if c.qk_rope_head_dim % 2:
        raise InputError(f"config field qk_rope_head_dim is {c.qk_rope_head_dim}, it must be even: rotary pairs")
    if c.first_k_dense_replace > c.num_hidden_layers:
        count = c.first_k_dense_replace
        raise InputError(f"config field first_k_dense_replace is {count}, above num_hidden_layers ({c.num_hidden_layers})")
    if c.num_nextn_predict_layers and c.model_type != "deepseek_v3":
        raise InputError(
            f"config field num_nextn_predict_layers is {c.num_nextn_predict_layers}, but {c.model_type} has no MTP; use 0"
        )
    if c.num_nextn_predict_layers >= c.max_position_embeddings:
        raise InputError(
            f"config field num_nextn_predict_layers is {c.num_nextn_predict_layers}, not below max_position_embeddings"
        )
    _check_groups(c)


def _check_groups(c: ModelConfig) -> None:
    """Expert groups: the top-k must fit into the groups that are kept."""
    if c.num_experts_per_tok > c.n_routed_experts:
        raise InputError(
            f"config field num_experts_per_tok is {c.num_experts_per_tok}, above n_routed_experts ({c.n_routed_experts})"
        )
    if c.topk_method == "greedy":  # looks at no groups
        return
    if c.n_routed_experts % c.n_group:
        raise InputError(f"config field n_group is {c.n_group}, it must divide n_routed_experts ({c.n_routed_experts})")
    if c.topk_group > c.n_group:
        raise InputError(f"config field topk_group is {c.topk_group}, above n_group ({c.n_group})")
    group_size = c.n_routed_experts // c.n_group
    if c.topk_method == "noaux_tc" and group_size < 2:
        raise InputError(f"config field n_group is {c.n_group}: groups of one expert have no top two to add; use fewer groups")
    if c.num_experts_per_tok > c.topk_group * group_size:
        raise InputError(
            f"config field num_experts_per_tok is {c.num_experts_per_tok}, above the {c.topk_group * group_size} experts "
            f"that topk_group {c.topk_group} of n_group {c.n_group} leaves"
        )


class ParamCounts(NamedTuple):
    """`total` without MTP; `active` per token, input embedding included; `mtp` as stored, with its embedding and head copies."""

    total: int
    active: int
    mtp: int


def count_params(config: ModelConfig) -> ParamCounts:
    """Parameters by formula (V3 section 4.2; router biases counted, as they are stored)."""
    c = config
    embedding = c.vocab_size * c.hidden_size
    attention = _attention_params(c)
    norms = 2 * c.hidden_size
    dense = 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    router = c.n_routed_experts * c.hidden_size + (c.n_routed_experts if c.uses_expert_bias else 0)
    moe_total = router + (c.n_routed_experts + c.n_shared_experts) * expert
    moe_active = router + (c.num_experts_per_tok + c.n_shared_experts) * expert
    ends = (1 if c.tie_word_embeddings else 2) * embedding
    rest = ends + c.hidden_size + c.num_hidden_layers * (attention + norms) + c.first_k_dense_replace * dense
    mtp_layer = attention + norms + moe_total + 3 * c.hidden_size + 2 * c.hidden_size**2 + 2 * embedding
    return ParamCounts(
        total=rest + c.num_moe_layers * moe_total,
        active=rest + c.num_moe_layers * moe_active,
        mtp=c.num_nextn_predict_layers * mtp_layer,
    )


def _attention_params(c: ModelConfig) -> int:
    if not c.kv_lora_rank:
        query_width, key_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        biases = (query_width + 2 * key_width) * c.attention_bias + c.hidden_size * c.uses_output_bias
        return 2 * c.hidden_size * (query_width + key_width) + biases + 2 * c.head_dim * c.uses_qk_norm
    query_width = c.num_attention_heads * c.qk_head_dim
    query = c.hidden_size * query_width
    if c.q_lora_rank is not None:
        query = c.hidden_size * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * query_width
    latent = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    expand = c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + latent + expand + c.num_attention_heads * c.v_head_dim * c.hidden_size


class TensorSpec(NamedTuple):
    """One stored tensor; `dtype` is safetensors' name: BF16, F32, F16 or F8_E4M3."""

    name: str
    shape: tuple[int, ...]
    dtype: str


_STORED_DTYPE = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}


def checkpoint_tensors(config: ModelConfig, fp8: bool | None = None) -> Iterator[TensorSpec]:
    """Every tensor of the HF checkpoint, in layer order. With `fp8` (default: the config's own), each projection is E4M3 and is
    followed by its `weight_scale_inv`, float32, of shape (ceil(out / 128), ceil(in / 128)); embeddings, head, norms, biases, router
    and `eh_proj` keep the model's dtype, and router biases are float32 always. A head tied to the embedding is not stored again."""
    c = config
    fp8 = c.fp8 if fp8 is None else fp8
    dtype = _STORED_DTYPE[c.torch_dtype]
    yield TensorSpec("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), dtype)
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        is_mtp = layer >= c.num_hidden_layers
        if is_mtp:
            yield TensorSpec(prefix + "embed_tokens.weight", (c.vocab_size, c.hidden_size), dtype)
            yield TensorSpec(prefix + "enorm.weight", (c.hidden_size,), dtype)
            yield TensorSpec(prefix + "hnorm.weight", (c.hidden_size,), dtype)
            yield TensorSpec(prefix + "eh_proj.weight", (c.hidden_size, 2 * c.hidden_size), dtype)
        yield TensorSpec(prefix + "input_layernorm.weight", (c.hidden_size,), dtype)
        for spec in (*_attention_tensors(c, prefix), *_ffn_tensors(c, prefix, layer)):
            if not spec.dtype:  # a projection
                yield TensorSpec(spec.name, spec.shape, "F8_E4M3" if fp8 else dtype)
                if fp8:
                    rows, columns = (-(-size // FP8_BLOCK) for size in spec.shape)
                    yield TensorSpec(spec.name + "_scale_inv", (rows, columns), "F32")
            else:
                yield spec
        yield TensorSpec(prefix + "post_attention_layernorm.weight", (c.hidden_size,), dtype)
        if is_mtp:
            yield TensorSpec(prefix + "shared_head.norm.weight", (c.hidden_size,), dtype)
            yield TensorSpec(prefix + "shared_head.head.weight", (c.vocab_size, c.hidden_size), dtype)
    yield TensorSpec("model.norm.weight", (c.hidden_size,), dtype)
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), dtype)


def _attention_tensors(c: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    """Projections carry an empty dtype: the caller decides between FP8 and the model's own."""
    prefix, dtype = prefix + "self_attn.", _STORED_DTYPE[c.torch_dtype]
    query_width = c.num_attention_heads * c.qk_head_dim
    if not c.kv_lora_rank:
        key_width = c.num_key_value_heads * c.head_dim
        for name, width in (("q_proj", query_width), ("k_proj", key_width), ("v_proj", key_width)):
            yield TensorSpec(f"{prefix}{name}.weight", (width, c.hidden_size), "")
            if c.attention_bias:
                yield TensorSpec(f"{prefix}{name}.bias", (width,), dtype)
        yield TensorSpec(prefix + "o_proj.weight", (c.hidden_size, query_width), "")
        if c.uses_output_bias:
            yield TensorSpec(prefix + "o_proj.bias", (c.hidden_size,), dtype)
        if c.uses_qk_norm:
            yield TensorSpec(prefix + "q_norm.weight", (c.head_dim,), dtype)
            yield TensorSpec(prefix + "k_norm.weight", (c.head_dim,), dtype)
        return
    if c.q_lora_rank is None:
        yield TensorSpec(prefix + "q_proj.weight", (query_width, c.hidden_size), "")
    else:
        yield TensorSpec(prefix + "q_a_proj.weight", (c.q_lora_rank, c.hidden_size), "")
        yield TensorSpec(prefix + "q_a_layernorm.weight", (c.q_lora_rank,), dtype)
        yield TensorSpec(prefix + "q_b_proj.weight", (query_width, c.q_lora_rank), "")
    yield TensorSpec(prefix + "kv_a_proj_with_mqa.weight", (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size), "")
    yield TensorSpec(prefix + "kv_a_layernorm.weight", (c.kv_lora_rank,), dtype)
    expanded = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield TensorSpec(prefix + "kv_b_proj.weight", (expanded, c.kv_lora_rank), "")
    yield TensorSpec(prefix + "o_proj.weight", (c.hidden_size, c.num_attention_heads * c.v_head_dim), "")


def _ffn_tensors(c: ModelConfig, prefix: str, layer: int) -> Iterator[TensorSpec]:
    def swiglu(name: str, width: int) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}mlp.{name}gate_proj.weight", (width, c.hidden_size), "")
        yield TensorSpec(f"{prefix}mlp.{name}up_proj.weight", (width, c.hidden_size), "")
        yield TensorSpec(f"{prefix}mlp.{name}down_proj.weight", (c.hidden_size, width), "")

    if layer < c.first_k_dense_replace:
        yield from swiglu("", c.intermediate_size)
        return
    yield TensorSpec(prefix + "mlp.gate.weight", (c.n_routed_experts, c.hidden_size), _STORED_DTYPE[c.torch_dtype])
    if c.uses_expert_bias:
        yield TensorSpec(prefix + "mlp.gate.e_score_correction_bias", (c.n_routed_experts,), "F32")
    for expert in range(c.n_routed_experts):
        yield from swiglu(f"experts.{expert}.", c.moe_intermediate_size)
    yield from swiglu("shared_experts.", c.n_shared_experts * c.moe_intermediate_size)
