"""How a model lies in a GGUF file: llama.cpp's names, its hyperparameters, and each tensor in its layout. `model/gguf.py` writes it.

A V2 or V3 model is a `deepseek2` there; the dense families keep their names. What changes on the way:

- `kv_b_proj` becomes two stacks over heads, because llama.cpp attends in the absorbed form only: `attn_k_b` [H, C, N], each head's key
  part transposed, and `attn_v_b` [H, V, C]. To its caches this is one key head of C + R and one value head of C.
- The experts of a layer become three stacks [E, out, in].
- In a `llama`, rotary pairs are neighbours, so the rows of queries and keys are put in that order (Qwen's keep the published one).
  Llama 3.1's scaling becomes a tensor: what each frequency is divided by.
- Vectors and the router are float32 always, other weights have the type that was asked for.
- MTP layers stay behind, as V3's do in llama.cpp's own converter.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finback.config import InputError, Llama3RopeScaling, ModelConfig, RopeScaling, TensorSpec, checkpoint_tensors
from finback.ops.rotary import inverse_frequencies, softmax_scale, yarn_table_scale

Metadata = Mapping[str, str | bool | int | float | list[str] | list[int]]
"""Keys of a GGUF file. Integers are stored as uint32 (in lists as int32), floats as float32."""

STORED_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's name of a type -> the format's."""

_GATING = {"softmax": 1, "sigmoid": 2}
_MOST_LAYERS, _MOST_EXPERTS = 512, 1024  # sizes of arrays in llama.cpp
_YARN_BETAS = (32.0, 1.0)  # compiled in: the file's are not read for these architectures
_LATENT_NORM_EPS = 1e-6

_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_ROUTER = "ffn_gate_inp.weight"
_FREQUENCIES = "rope_freqs.weight"


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the computation."""
    return "deepseek2" if config.kv_lora_rank else config.model_type


def check_exportable(config: ModelConfig) -> None:
    """Raise InputError with the reason if llama.cpp would compute something else than this model, or cannot load it."""
    c = config
    scaling = c.rope_scaling
    if isinstance(scaling, RopeScaling) and (scaling.beta_fast, scaling.beta_slow) != _YARN_BETAS:
        raise InputError(
            f"config fields rope_scaling.beta_fast and beta_slow are {scaling.beta_fast} and {scaling.beta_slow}: llama.cpp computes "
            f"with {_YARN_BETAS[0]} and {_YARN_BETAS[1]} whatever a file says; this model cannot become GGUF"
        )
    for name, most in (("num_hidden_layers", _MOST_LAYERS), ("n_routed_experts", _MOST_EXPERTS)):
        if getattr(c, name) > most:
            raise InputError(
                f"config field {name} is {getattr(c, name)}, llama.cpp has room for {most}; this model cannot become GGUF"
            )
    if c.kv_lora_rank:
        _check_latent(c)
    else:
        _check_dense(c)


def _check_latent(c: ModelConfig) -> None:
    if c.topk_method == "group_limited_greedy" and c.topk_group < c.n_group:
        raise InputError(
            f"config field topk_method is {c.topk_method!r} with topk_group {c.topk_group} of n_group {c.n_group}: llama.cpp ranks "
            "groups by their two best experts, not by their best, and would choose others; this model cannot become GGUF"
        )
    if c.rms_norm_eps != _LATENT_NORM_EPS:
        raise InputError(
            f"config field rms_norm_eps is {c.rms_norm_eps}: llama.cpp would use it for the latent norms too, which DeepSeek's code "
            f"computes with {_LATENT_NORM_EPS}; only {_LATENT_NORM_EPS} can become GGUF"
        )
    if c.q_lora_rank is not None and _looks_like_lite(c):
        raise InputError(
            f"config field q_lora_rank is {c.q_lora_rank}, but llama.cpp takes a model of {c.num_hidden_layers} layers for V2-Lite and "
            "looks for none; this model cannot become GGUF"
        )


def _looks_like_lite(c: ModelConfig) -> bool:
    """How llama.cpp tells V2-Lite and two models like it, for which it reads no q_lora_rank."""
    return c.num_hidden_layers in (26, 27) or (c.num_hidden_layers == 48 and c.vocab_size == 128256)


def _check_dense(c: ModelConfig) -> None:
    if isinstance(c.rope_scaling, Llama3RopeScaling) and c.model_type != "llama":
        raise InputError(
            f"config field rope_scaling is Llama 3's, which llama.cpp does not compute for {c.model_type}; this model cannot become "
            "GGUF"
        )
    if c.uses_output_bias and c.model_type != "llama":
        raise InputError(
            f"config field attention_bias is True, and llama.cpp's {c.model_type} has no bias after attention; it cannot become "
            "GGUF"
        )
    if c.model_type == "qwen2" and c.head_dim * c.num_attention_heads != c.hidden_size:
        raise InputError(
            f"config field head_dim is {c.head_dim}, but llama.cpp's qwen2 wants hidden_size / num_attention_heads "
            f"({c.hidden_size} / {c.num_attention_heads}); this model cannot become GGUF"
        )


def hyperparameters(config: ModelConfig) -> Metadata:
    """What llama.cpp needs to know of the architecture, under its keys."""
    c = config
    keys = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": c.rope_theta,
        **(_latent_keys(c) if c.kv_lora_rank else _grouped_keys(c)),
        **_rope_scaling(c),
    }
    return {f"{architecture(c)}.{name}": value for name, value in keys.items()}


def _grouped_keys(c: ModelConfig) -> dict[str, Any]:
    return {
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
    }


def _latent_keys(c: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": c.q_lora_rank or 0,  # required of models that are not taken for V2-Lite
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": _GATING[c.scoring_func],
    }
    if c.topk_group < c.n_group and c.topk_method != "greedy":  # llama.cpp refuses groups of which none is dropped
        keys |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    return keys


def _rope_scaling(c: ModelConfig) -> dict[str, Any]:
    """YaRN's keys, chosen so that llama.cpp arrives at our factor T on cos and sin and at our softmax scale.

    By itself it multiplies cos and sin by F = 0.1 ln(factor) + 1, and by `attn_factor` besides. In a `deepseek2` it also multiplies the
    softmax scale by the square of T (0.1 m ln(factor) + 1), where the file holds 0.1 m; and where m is not 0, it leaves F out of T.
    Released models have T = 1, so m is their `mscale_all_dim`.
    """
    if not isinstance(c.rope_scaling, RopeScaling) or c.rope_scaling.factor == 1:
        return {}
    logarithm = 0.1 * math.log(c.rope_scaling.factor)
    table = yarn_table_scale(c.rope_scaling)
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": c.rope_scaling.factor,
        "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
    }
    attn_factor = table / (1 + logarithm)
    if c.kv_lora_rank:
        softmax = math.sqrt(softmax_scale(c) * math.sqrt(c.qk_head_dim))
        multiplier = (softmax / table - 1) / logarithm
        if abs(multiplier) > 1e-9:  # otherwise T = F
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * multiplier
            attn_factor = table
    if abs(attn_factor - 1) > 1e-9:
        keys["rope.scaling.attn_factor"] = attn_factor
    return keys


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The part of the model that is exported."""
    return replace(config, num_nextn_predict_layers=0)


def gguf_tensors(config: ModelConfig, dtype: str) -> list[TensorSpec]:
    """Every tensor of the file, in its order; `dtype` is torch's name of the type of the weights. Shapes are torch's, not reversed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in checkpoint_tensors(without_mtp(config), fp8=False):
        for name, expert, part in parts(spec.name, torch.empty(spec.shape, device="meta"), config):
            shapes[name] = tuple(part.shape) if expert is None else (config.n_routed_experts, *part.shape)
    shapes |= {name: tuple(tensor.shape) for name, tensor in computed(config)}
    return [
        TensorSpec(name, shape, "F32" if len(shape) == 1 or name.endswith(_ROUTER) else STORED_TYPES[dtype])
        for name, shape in shapes.items()
    ]


def computed(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the file that no published one becomes."""
    if isinstance(config.rope_scaling, Llama3RopeScaling):
        yield _FREQUENCIES, inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)


def parts(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, int | None, Tensor]]:
    """What a published tensor becomes: (name in the file, which expert of a stack, values)."""
    module, _, kind = name.rpartition(".")
    if module in _ENDS:
        yield f"{_ENDS[module]}.{kind}", None, tensor
        return
    _, _, layer, module = module.split(".", 3)
    block = f"blk.{layer}."
    if kind == "e_score_correction_bias":
        yield block + "exp_probs_b.bias", None, tensor
    elif module == "self_attn.kv_b_proj":
        heads = tensor.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
        key, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield block + "attn_k_b.weight", None, key.transpose(1, 2)
        yield block + "attn_v_b.weight", None, value
    elif module.startswith("mlp.experts."):
        _, _, expert, projection = module.split(".")
        yield f"{block}{_LAYER[f'mlp.experts.{projection}']}.weight", int(expert), tensor
    else:
        if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _interleaved(tensor, config.head_dim)
        yield f"{block}{_LAYER[module]}.{kind}", None, tensor


def _interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows, or values of a bias, whose rotary pairs are the halves of a head: the pairs made neighbours."""
    pairs: Tensor = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return pairs.transpose(1, 2).flatten(0, 2)
