"""The model's configuration, exactly as DeepSeek publishes it, and what follows from it by arithmetic alone.

`ModelConfig` reads every published form of `config.json` (V2, V2-Lite, V3, R1, and what `transformers` writes back) and writes the
published one. Parameter counts and the table of checkpoint tensors are formulas over it: nothing here allocates, and nothing
here imports torch.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

FP8_BLOCK = 128  # rows and columns that share one scale in DeepSeek's FP8 layout


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names the field or file, the value and the remedy."""


def nearest(name: str, valid: list[str]) -> str:
    """The closest valid name as a hint to append to an error, or an empty string."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (V3 section 4.3, V2 section 3.1.4), applied to the decoupled rotary dimensions only.

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
        if self.factor < 1:
            raise InputError(f"config field rope_scaling.factor is {self.factor}, it must be at least 1")
        if self.original_max_position_embeddings < 1:
            value = self.original_max_position_embeddings
            raise InputError(f"config field rope_scaling.original_max_position_embeddings is {value}, it must be positive")
        if self.beta_fast <= self.beta_slow:
            raise InputError(
                f"config field rope_scaling.beta_fast is {self.beta_fast}, it must be larger than beta_slow ({self.beta_slow})"
            )


# Fields of config.json that are read into ModelConfig under their own name.
# fmt: off
_INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
    "num_nextn_predict_layers", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "max_position_embeddings",
)
# fmt: on
_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")
_NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "initializer_range", "rope_theta")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that do not change what the model computes: ignored whatever they hold.
# fmt: off
_NEUTRAL = frozenset((
    "architectures", "auto_map", "transformers_version", "use_cache", "ep_size", "aux_loss_alpha", "seq_aux", "torchscript",
    "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "return_dict", "chunk_size_feed_forward", "id2label",
    "label2id", "problem_type", "output_attentions", "output_hidden_states", "_name_or_path", "name_or_path",
))
# fmt: on

# Fields that do change it, and the only value the computation here supports.
_ONLY_SUPPORTED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
}

_ARCHITECTURES = {"DeepseekV3ForCausalLM": "deepseek_v3", "DeepseekV2ForCausalLM": "deepseek_v2"}

# What a file leaves out: transformers drops these two, because its classes imply them.
_IMPLIED = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}
_ROUTING = {
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True, False)},
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        # transformers ignores the field for V2, and V2's own code then skips the scaling factor: two computations, neither released.
        "norm_topk_prob": (False,),
    },
}
_DTYPES = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V2/V3 model. Field names are those of the published `config.json`; defaults are V3's conventions.

    `fp8` is true where the file's `quantization_config` says that weights are stored as E4M3 in 128x128 blocks.
    Raises InputError for values that contradict each other or that no supported computation matches.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
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
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    torch_dtype: str = "float32"
    model_type: str = "deepseek_v3"
    fp8: bool = False

    def __post_init__(self) -> None:
        _check_config(self)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers of the main model with routed experts; each MTP layer has one more router."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def uses_expert_bias(self) -> bool:
        """Auxiliary-loss-free balancing (V3 section 2.1.2): the router carries `e_score_correction_bias`."""
        return self.topk_method == "noaux_tc"

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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not JSON ({error}); restore the file") from None
        if not isinstance(data, dict):
            raise InputError(f"{path} holds {type(data).__name__}, not a JSON object; restore the file")
        try:
            return cls.from_dict(data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Read any published form of `config.json` (see the module docstring)."""
        architectures = data.get("architectures")
        data = {key: value for key, value in data.items() if key not in _NEUTRAL}
        model_type = _read_model_type(data, architectures)
        implied = _IMPLIED[model_type]
        _read_mtp(data)
        values: dict[str, Any] = {"model_type": model_type}
        rope_theta, values["rope_scaling"] = _read_rope(data)
        data["rope_theta"] = 10000.0 if rope_theta is None else rope_theta
        for name in ("n_group", "topk_group"):
            if data.get(name) is None:  # greedy V2 as transformers writes it
                data[name] = 1
        values["torch_dtype"] = _read_dtype(data)
        values["fp8"] = _read_fp8(data.pop("quantization_config", None))
        for name in _INTEGERS:
            if name in data:
                values[name] = _integer(name, data.pop(name))
        for name in _NUMBERS:
            if name in data:
                values[name] = _number(name, data.pop(name))
        for name in _TOKEN_IDS:
            if name in data:
                values[name] = _token_id(name, data.pop(name))
        rank = data.pop("q_lora_rank", None)
        values["q_lora_rank"] = None if rank is None else _integer("q_lora_rank", rank)
        for name in ("scoring_func", "topk_method", "norm_topk_prob"):
            value = data.pop(name, None)
            values[name] = implied[name] if value is None else value
            if type(values[name]) is not type(implied[name]):
                raise InputError(f"config field {name} is {value!r}, it must be like {implied[name]!r}")
        _check_derived(data, values)
        _check_unsupported(data)
        missing = [f.name for f in fields(cls) if f.name not in values and f.name in _required(cls)]
        if missing:
            raise InputError(f"config field {missing[0]} is missing; add it (all missing: {', '.join(missing)})")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The published form of `config.json`, which transformers, vLLM and SGLang read."""
        architecture = {v: k for k, v in _ARCHITECTURES.items()}[self.model_type]
        published: dict[str, Any] = {
            "architectures": [architecture],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "model_type": self.model_type,
            "moe_layer_freq": 1,
            "num_key_value_heads": self.num_attention_heads,
            "tie_word_embeddings": False,
            "use_cache": True,
        }
        own = ("model_type", "rope_scaling", "fp8", "eos_token_id", "pad_token_id", "num_nextn_predict_layers")
        published |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        published["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        if self.pad_token_id is not None:
            published["pad_token_id"] = self.pad_token_id
        if self.model_type == "deepseek_v3" or self.num_nextn_predict_layers:
            published["num_nextn_predict_layers"] = self.num_nextn_predict_layers
        published["rope_scaling"] = None
        if self.rope_scaling is not None:
            scaling = {f.name: getattr(self.rope_scaling, f.name) for f in fields(RopeScaling)}
            published["rope_scaling"] = {k: v for k, v in scaling.items() if v is not None} | {"type": "yarn"}
        if self.fp8:
            published["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            }
        return dict(sorted(published.items()))


def _required(cls: type[ModelConfig]) -> list[str]:
    return [f.name for f in fields(cls) if f.name in _INTEGERS]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"config field {name} is {value!r}, it must be a whole number")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"config field {name} is {value!r}, it must be a finite number")
    return float(value)


def _token_id(name: str, value: Any) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    if name == "eos_token_id" and isinstance(value, list):
        return tuple(_integer(name, item) for item in value)
    return _integer(name, value)


def _read_model_type(data: dict[str, Any], architectures: Any) -> str:
    model_type = data.pop("model_type", None)
    if model_type is None:
        raise InputError(f"config field model_type is missing; add one of {', '.join(_IMPLIED)}")
    if not isinstance(model_type, str) or model_type not in _IMPLIED:
        raise InputError(f"config field model_type is {model_type!r}, supported are {', '.join(_IMPLIED)}")
    expected = {kind: architecture for architecture, kind in _ARCHITECTURES.items()}[model_type]
    if architectures not in (None, [], [expected]):
        raise InputError(
            f"config field architectures is {architectures!r}, but model_type {model_type} is {expected}; correct one"
        )
    return model_type


def _read_mtp(data: dict[str, Any]) -> None:
    """transformers has another name for the same field; a missing or null one means no MTP."""
    counts = [data.pop(name, None) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    given = [count for count in counts if count is not None]
    if len(given) == 2 and given[0] != given[1]:
        disagree = f"num_nextn_predict_layers ({given[0]}) and num_mtp_layers ({given[1]}) disagree"
        raise InputError(f"config fields {disagree}; keep one")
    data["num_nextn_predict_layers"] = given[0] if given else 0


def _read_rope(data: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Both spellings: rope_theta beside rope_scaling (published), or one rope_parameters (transformers)."""
    theta = data.pop("rope_theta", None)
    scaling = data.pop("rope_scaling", None)
    parameters = data.pop("rope_parameters", None)
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            raise InputError(f"config field rope_parameters is {parameters!r}, it must be an object")
        other = dict(parameters)
        other_theta = other.pop("rope_theta", None)
        if theta is not None and other_theta is not None and theta != other_theta:
            raise InputError(
                f"config fields rope_theta ({theta}) and rope_parameters.rope_theta ({other_theta}) disagree; keep one"
            )
        theta = other_theta if theta is None else theta
        if scaling is not None and _yarn(scaling) != _yarn(other):
            raise InputError("config fields rope_scaling and rope_parameters disagree; keep one")
        scaling = other
    return theta, _yarn(scaling)


def _yarn(scaling: Any) -> RopeScaling | None:
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise InputError(f"config field rope_scaling is {scaling!r}, it must be null or an object")
    left = {key: value for key, value in scaling.items() if value is not None}
    kinds = {str(left.pop(key)) for key in ("type", "rope_type") if key in left}
    if len(kinds) > 1:
        raise InputError(f"config fields rope_scaling.type and rope_type disagree ({', '.join(sorted(kinds))}); keep one")
    kind = kinds.pop() if kinds else "default"
    if left.pop("truncate", True) is not True:
        raise InputError("config field rope_scaling.truncate is false, only true is supported; remove it")
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config field rope_scaling.partial_rotary_factor must be 1.0 for MLA; remove it")
    if kind == "default":
        left.pop("factor", None)
        if left:
            raise InputError(f"config field rope_scaling has {sorted(left)[0]!r} but no type; add type 'yarn' or remove it")
        return None
    if kind != "yarn":
        raise InputError(f"config field rope_scaling.type is {kind!r}, supported are 'yarn' and null")
    names = [f.name for f in fields(RopeScaling)]
    for key in left:
        if key not in names:
            raise InputError(f"config field rope_scaling.{key} is not supported{nearest(key, names)}; remove it")
    for key in ("factor", "original_max_position_embeddings"):
        if key not in left:
            raise InputError(f"config field rope_scaling.{key} is missing; add it")
    values: dict[str, Any] = {key: _number(f"rope_scaling.{key}", value) for key, value in left.items()}
    original = left["original_max_position_embeddings"]
    values["original_max_position_embeddings"] = _integer("rope_scaling.original_max_position_embeddings", original)
    return RopeScaling(**values)


def _read_dtype(data: dict[str, Any]) -> str:
    found = {str(value) for value in (data.pop("torch_dtype", None), data.pop("dtype", None)) if value is not None}
    if len(found) > 1:
        raise InputError(f"config fields torch_dtype and dtype disagree ({', '.join(sorted(found))}); keep one")
    dtype = found.pop() if found else "bfloat16"
    if dtype not in _DTYPES:
        raise InputError(f"config field torch_dtype is {dtype!r}, supported are {', '.join(_DTYPES)}")
    return dtype


def _read_fp8(quantization: Any) -> bool:
    if quantization is None:
        return False
    if not isinstance(quantization, Mapping):
        raise InputError(f"config field quantization_config is {quantization!r}, it must be null or an object")
    expected: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3", None),
        "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
        "activation_scheme": ("dynamic", None),
    }
    for key, allowed in expected.items():
        if quantization.get(key) not in allowed:
            value = quantization.get(key)
            raise InputError(f"config field quantization_config.{key} is {value!r}, supported is {allowed[0]!r}")
    # How activations are rounded (scale_fmt) and which modules stay unquantised follow from the stored tensors.
    harmless = {*expected, "scale_fmt", "modules_to_not_convert", "dequantize"}
    for key in quantization:
        if key not in harmless:
            raise InputError(f"config field quantization_config.{key} is not supported; remove it")
    return True


def _check_derived(data: dict[str, Any], values: dict[str, Any]) -> None:
    """Fields that repeat what others already say must say the same."""
    size = {name: values.get(name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "num_attention_heads")}
    derived = {
        "qk_head_dim": size["qk_nope_head_dim"] + size["qk_rope_head_dim"],
        "head_dim": size["qk_rope_head_dim"],
        "num_key_value_heads": size["num_attention_heads"],
    }
    for name, expected in derived.items():
        value = data.pop(name, None)
        if value is not None and value != expected:
            raise InputError(f"config field {name} is {value!r}, but the other fields give {expected}; correct or remove it")


def _check_unsupported(data: dict[str, Any]) -> None:
    for name, supported in _ONLY_SUPPORTED.items():
        value = data.pop(name, supported)
        if value is not None and value != supported:
            raise InputError(f"config field {name} is {value!r}, only {supported!r} is supported")
    known = [f.name for f in fields(ModelConfig)]
    for name, value in data.items():
        if value is not None:  # null means that the feature is off
            raise InputError(f"config field {name} ({value!r}) is not supported{nearest(name, known)}")


def _check_config(c: ModelConfig) -> None:
    for name in _INTEGERS:
        value, least = getattr(c, name), 0 if name in _MAY_BE_ZERO else 1
        if value < least:
            raise InputError(f"config field {name} is {value}, it must be at least {least}")
    if c.q_lora_rank is not None and c.q_lora_rank < 1:
        raise InputError(f"config field q_lora_rank is {c.q_lora_rank}, it must be positive, or null for no query compression")
    for name in _NUMBERS:
        if getattr(c, name) <= 0:
            raise InputError(f"config field {name} is {getattr(c, name)}, it must be positive")
    if c.model_type not in _ROUTING:
        raise InputError(f"config field model_type is {c.model_type!r}, supported are {', '.join(_ROUTING)}")
    for name, allowed in _ROUTING[c.model_type].items():
        if getattr(c, name) not in allowed:
            raise InputError(
                f"config field {name} is {getattr(c, name)!r}, {c.model_type} supports {' or '.join(map(repr, allowed))}"
            )
    if c.torch_dtype not in _DTYPES:
        raise InputError(f"config field torch_dtype is {c.torch_dtype!r}, supported are {', '.join(_DTYPES)}")
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
    for name in _TOKEN_IDS:
        value = getattr(c, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < c.vocab_size:
                raise InputError(f"config field {name} is {token}, outside vocab_size ({c.vocab_size})")


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
    rest = 2 * embedding + c.hidden_size + c.num_hidden_layers * (attention + norms) + c.first_k_dense_replace * dense
    mtp_layer = attention + norms + moe_total + 3 * c.hidden_size + 2 * c.hidden_size**2 + 2 * embedding
    return ParamCounts(
        total=rest + c.num_moe_layers * moe_total,
        active=rest + c.num_moe_layers * moe_active,
        mtp=c.num_nextn_predict_layers * mtp_layer,
    )


def _attention_params(c: ModelConfig) -> int:
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
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}


def checkpoint_tensors(config: ModelConfig, fp8: bool | None = None) -> Iterator[TensorSpec]:
    """Every tensor of the HF checkpoint, in layer order. With `fp8` (default: the config's own), each projection is E4M3 and is
    followed by its `weight_scale_inv`, float32, of shape (ceil(out / 128), ceil(in / 128)); embeddings, head, norms, router and
    `eh_proj` keep the model's dtype, and router biases are float32 always."""
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
    yield TensorSpec("lm_head.weight", (c.vocab_size, c.hidden_size), dtype)


def _attention_tensors(c: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    """Projections carry an empty dtype: the caller decides between FP8 and the model's own."""
    prefix, dtype = prefix + "self_attn.", _STORED_DTYPE[c.torch_dtype]
    query_width = c.num_attention_heads * c.qk_head_dim
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
