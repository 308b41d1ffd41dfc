"""From any published form of `config.json` to the fields of `ModelConfig`: what it says, what it leaves out, what is not supported.

A field that changes the computation and is not supported is an error that names it; one that does not is ignored. `transformers`
writes other forms than the published ones (`rope_parameters`, `dtype`, `layer_types`); they are read as well.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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
    read_flag,
    read_integer,
    read_number,
    read_token_id,
)

# Fields that do not change what the model computes: ignored whatever they hold.
# fmt: off
_NEUTRAL = frozenset((
    "architectures", "auto_map", "transformers_version", "use_cache", "ep_size", "aux_loss_alpha", "seq_aux", "torchscript",
    "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "return_dict", "chunk_size_feed_forward", "id2label",
    "label2id", "problem_type", "output_attentions", "output_hidden_states", "_name_or_path", "name_or_path",
    "is_llama_config", "transformers.js_config",
))
# fmt: on

# Fields that do change it, and the only value the computation here supports.
_ONLY_SUPPORTED: dict[str, Any] = {
    "mlp_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "is_encoder_decoder": False,
}
_ONLY_DEEPSEEK: dict[str, Any] = {
    "attention_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}
_ONLY_DENSE: dict[str, Any] = {"use_mrope": False, "rope_interleaved": False, "partial_rotary_factor": 1}

# What a DeepSeek file leaves out: transformers drops these, because its classes imply them.
_IMPLIED = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}
# What a dense file leaves out: the defaults of transformers' classes.
_DENSE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02},
    "qwen2": {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02},
    "qwen3": {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.02},
}
# The families differ in which of these their files may leave to be derived.
_DENSE_REQUIRED = {"llama": (), "qwen2": ("num_key_value_heads",), "qwen3": ("num_key_value_heads", "head_dim")}


def read_config(data: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """The arguments of ModelConfig that a config.json gives; `known` are the names of its fields, for hints."""
    architectures = data.get("architectures")
    data = {key: value for key, value in data.items() if key not in _NEUTRAL}
    model_type = _read_model_type(data, architectures)
    dense = model_type in DENSE_FAMILIES
    values: dict[str, Any] = dict(_DENSE_DEFAULTS[model_type]) if dense else {}
    values["model_type"] = model_type
    rope_theta, values["rope_scaling"] = _read_rope(data, dense)
    data["rope_theta"] = 10000.0 if rope_theta is None else rope_theta
    values["torch_dtype"] = _read_dtype(data)
    values["fp8"] = _read_fp8(data.pop("quantization_config", None))
    if dense:
        _read_dense(data, values)
    else:
        _read_deepseek(data, values)
    for name in NUMBERS:
        if name in data and not (dense and name == "routed_scaling_factor"):
            values[name] = read_number(name, data.pop(name))
    for name in TOKEN_IDS:
        if name in data:
            values[name] = read_token_id(name, data.pop(name))
    if not dense:
        _check_derived(data, values)
    _check_unsupported(data, _ONLY_SUPPORTED | (_ONLY_DENSE if dense else _ONLY_DEEPSEEK), known)
    required = (*COMMON_INTEGERS, *(_DENSE_REQUIRED[model_type] if dense else DEEPSEEK_INTEGERS))
    missing = [name for name in known if name in required and name not in values]
    if missing:
        raise InputError(f"config field {missing[0]} is missing; add it (all missing: {', '.join(missing)})")
    return values


def _read_model_type(data: dict[str, Any], architectures: Any) -> str:
    model_type = data.pop("model_type", None)
    if model_type is None:
        raise InputError(f"config field model_type is missing; add one of {', '.join(ARCHITECTURES)}")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(f"config field model_type is {model_type!r}, supported are {', '.join(ARCHITECTURES)}")
    expected = ARCHITECTURES[model_type]
    if architectures not in (None, [], [expected]):
        raise InputError(
            f"config field architectures is {architectures!r}, but model_type {model_type} is {expected}; correct one"
        )
    return model_type


def _read_deepseek(data: dict[str, Any], values: dict[str, Any]) -> None:
    implied = _IMPLIED[values["model_type"]]
    _read_mtp(data)
    for name in ("n_group", "topk_group"):
        if data.get(name) is None:  # greedy V2 as transformers writes it
            data[name] = 1
    for name in (*COMMON_INTEGERS, *DEEPSEEK_INTEGERS):
        if name in data:
            values[name] = read_integer(name, data.pop(name))
    rank = data.pop("q_lora_rank", None)
    values["q_lora_rank"] = None if rank is None else read_integer("q_lora_rank", rank)
    for name in ("scoring_func", "topk_method", "norm_topk_prob"):
        value = data.pop(name, None)
        values[name] = implied[name] if value is None else value
        if type(values[name]) is not type(implied[name]):
            raise InputError(f"config field {name} is {value!r}, it must be like {implied[name]!r}")


def _read_mtp(data: dict[str, Any]) -> None:
    """transformers has another name for the same field; a missing or null one means no MTP."""
    counts = [data.pop(name, None) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    given = [count for count in counts if count is not None]
    if len(given) == 2 and given[0] != given[1]:
        disagree = f"num_nextn_predict_layers ({given[0]}) and num_mtp_layers ({given[1]}) disagree"
        raise InputError(f"config fields {disagree}; keep one")
    data["num_nextn_predict_layers"] = given[0] if given else 0


def _read_dense(data: dict[str, Any], values: dict[str, Any]) -> None:
    for name in (*COMMON_INTEGERS, *DENSE_INTEGERS):
        value = data.pop(name, None)
        if value is not None:  # null: derived, as if it were not there
            values[name] = read_integer(name, value)
            if name in DENSE_INTEGERS and value < 1:  # 0 means "derived" in ModelConfig, not in a file
                raise InputError(f"config field {name} is {value}, it must be at least 1")
    for name in ("attention_bias", "tie_word_embeddings"):
        value = data.pop(name, None)
        if value is not None:
            values[name] = read_flag(name, value)
    if values["model_type"] == "qwen2" and values.setdefault("attention_bias", True) is False:
        raise InputError("config field attention_bias is False, but qwen2 always has query, key and value biases; remove it")
    _read_windows(data, values.get("num_hidden_layers"))


def _read_windows(data: dict[str, Any], layers: int | None) -> None:
    """A window that is switched off may have any size; one that is on is another computation."""
    window = data.pop("sliding_window", None)
    used = data.pop("use_sliding_window", None)
    data.pop("max_window_layers", None)
    used = window is not None if used is None else read_flag("use_sliding_window", used)
    if used and window is not None:
        raise InputError(f"config field sliding_window is {window!r} and in use, only full attention is supported")
    types = data.pop("layer_types", None)
    if types is None:
        return
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise InputError(f"config field layer_types is {types!r}, supported is 'full_attention' for every layer")
    if layers is not None and len(types) != layers:
        raise InputError(f"config field layer_types has {len(types)} entries, but num_hidden_layers is {layers}; correct one")


def _read_rope(data: dict[str, Any], dense: bool) -> tuple[Any, RopeScaling | Llama3RopeScaling | None]:
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
        if scaling is not None and _read_scaling(scaling, dense) != _read_scaling(other, dense):
            raise InputError("config fields rope_scaling and rope_parameters disagree; keep one")
        scaling = other
    return theta, _read_scaling(scaling, dense)


def _read_scaling(scaling: Any, dense: bool) -> RopeScaling | Llama3RopeScaling | None:
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
        raise InputError("config field rope_scaling.partial_rotary_factor must be 1.0; remove it")
    if kind == "default":
        left.pop("factor", None)
        if left:
            raise InputError(f"config field rope_scaling has {sorted(left)[0]!r} but no type; add type 'yarn' or remove it")
        return None
    classes: dict[str, type[RopeScaling] | type[Llama3RopeScaling]] = {"yarn": RopeScaling}
    if dense:
        classes["llama3"] = Llama3RopeScaling
    if kind not in classes:
        supported = ", ".join(map(repr, classes))
        raise InputError(f"config field rope_scaling.type is {kind!r}, supported are {supported} and null")
    names = [f.name for f in fields(classes[kind])]
    for key in left:
        if key not in names:
            raise InputError(f"config field rope_scaling.{key} is not supported{nearest(key, names)}; remove it")
    for f in fields(classes[kind]):
        if f.name not in left and f.name in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
            raise InputError(f"config field rope_scaling.{f.name} is missing; add it")
    values: dict[str, Any] = {key: read_number(f"rope_scaling.{key}", value) for key, value in left.items()}
    original = left["original_max_position_embeddings"]
    values["original_max_position_embeddings"] = read_integer("rope_scaling.original_max_position_embeddings", original)
    return classes[kind](**values)


def _read_dtype(data: dict[str, Any]) -> str:
    found = {str(value) for value in (data.pop("torch_dtype", None), data.pop("dtype", None)) if value is not None}
    if len(found) > 1:
        raise InputError(f"config fields torch_dtype and dtype disagree ({', '.join(sorted(found))}); keep one")
    dtype = found.pop() if found else "bfloat16"
    if dtype not in DTYPES:
        raise InputError(f"config field torch_dtype is {dtype!r}, supported are {', '.join(DTYPES)}")
    return dtype


def _read_fp8(quantization: Any) -> bool:
    if quantization is None:
        return False
    if not isinstance(quantization, Mapping):
        raise InputError(f"config field quantization_config is {quantization!r}, it must be null or an object")
    if quantization.get("quant_method") == "gptq":
        # Dequantised as it is read: bits and groups follow from the stored tensors, only the zero points' convention does not.
        if quantization.get("checkpoint_format", "gptq") != "gptq":
            value = quantization["checkpoint_format"]
            raise InputError(f"config field quantization_config.checkpoint_format is {value!r}, supported is 'gptq'")
        return False
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


def _check_unsupported(data: dict[str, Any], only_supported: dict[str, Any], known: list[str]) -> None:
    for name, supported in only_supported.items():
        value = data.pop(name, supported)
        if value is not None and value != supported:
            raise InputError(f"config field {name} is {value!r}, only {supported!r} is supported")
    for name, value in data.items():
        if value is not None:  # null means that the feature is off
            raise InputError(f"config field {name} ({value!r}) is not supported{nearest(name, known)}")
