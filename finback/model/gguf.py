"""GGUF files, which llama.cpp and Ollama read: the architecture's hyperparameters and the tensors in its layout.

A V2 or V3 model is a `deepseek2` there. What changes on the way:

- `kv_b_proj` becomes two stacks over heads, because llama.cpp attends in the absorbed form only: `attn_k_b` [H, C, N], each head's key
  part transposed, and `attn_v_b` [H, V, C]. To its caches this is one key head of C + R and one value head of C.
- The experts of a layer become three stacks [E, out, in].
- Vectors and the router are float32 always, other weights have the type that was asked for.
- MTP layers stay behind: llama.cpp has none for this architecture's V3 form.

Everything is planned from shapes first. Then tensors are drawn one by one and written to their places, so a file of any size needs the
memory of one tensor.
"""

import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.config import DTYPE_BYTES, InputError, ModelConfig, TensorSpec, checkpoint_tensors
from finback.ops.rotary import softmax_scale, yarn_table_scale

Metadata = Mapping[str, str | bool | int | float | list[str] | list[int]]
"""Keys of a GGUF file. Integers are stored as uint32 (in lists as int32), floats as float32."""

ARCHITECTURE = "deepseek2"
FILE_TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}
"""torch's name -> the format's name, and llama.cpp's number for a file of mostly that type."""

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZATION_VERSION = 2
_GATING = {"softmax": 1, "sigmoid": 2}
_LARGEST_F16 = 65504.0
_MOST_LAYERS, _MOST_EXPERTS = 512, 1024  # sizes of arrays in llama.cpp
_LATENT_NORM_EPS = 1e-6

_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
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


def check_exportable(config: ModelConfig) -> None:
    """Raise InputError with the reason if llama.cpp would compute something else than this model, or cannot load it."""
    c = config
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
    for name, most in (("num_hidden_layers", _MOST_LAYERS), ("n_routed_experts", _MOST_EXPERTS)):
        if getattr(c, name) > most:
            raise InputError(
                f"config field {name} is {getattr(c, name)}, llama.cpp has room for {most}; this model cannot become GGUF"
            )


def _looks_like_lite(c: ModelConfig) -> bool:
    """How llama.cpp tells V2-Lite and two models like it, for which it reads no q_lora_rank."""
    return c.num_hidden_layers in (26, 27) or (c.num_hidden_layers == 48 and c.vocab_size == 128256)


def hyperparameters(config: ModelConfig) -> Metadata:
    """What llama.cpp needs to know of the architecture, under its keys."""
    c = config
    keys: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
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
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
    }
    if c.topk_group < c.n_group and c.topk_method != "greedy":  # llama.cpp refuses groups of which none is dropped
        keys |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    return {f"{ARCHITECTURE}.{name}": value for name, value in (keys | _rope_scaling(c)).items()}


def _rope_scaling(c: ModelConfig) -> dict[str, Any]:
    """YaRN's keys, chosen so that llama.cpp arrives at our factor T on cos and sin and at our softmax scale.

    It multiplies cos and sin by T = `attn_factor` (by 0.1 ln(factor) + 1 besides if the log multiplier is 0) and the softmax scale by
    the square of T (0.1 m ln(factor) + 1), where the file holds 0.1 m. Released models have T = 1, so m is their `mscale_all_dim`.
    """
    if c.rope_scaling is None or c.rope_scaling.factor == 1:
        return {}
    table = yarn_table_scale(c.rope_scaling)
    softmax = math.sqrt(softmax_scale(c) * math.sqrt(c.qk_head_dim))
    multiplier = (softmax / table - 1) / (0.1 * math.log(c.rope_scaling.factor))
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": c.rope_scaling.factor,
        "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": c.rope_scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": c.rope_scaling.beta_slow,
    }
    if abs(multiplier) < 1e-9:  # T = 0.1 ln(factor) + 1: what llama.cpp does by itself
        return keys
    keys["rope.scaling.yarn_log_multiplier"] = 0.1 * multiplier
    if table != 1:
        keys["rope.scaling.attn_factor"] = table
    return keys


def gguf_tensors(config: ModelConfig, dtype: str) -> list[TensorSpec]:
    """Every tensor of the file, in its order; `dtype` is torch's name of the type of the weights. Shapes are torch's, not reversed."""
    weights, _ = FILE_TYPES[dtype]
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in checkpoint_tensors(without_mtp(config), fp8=False):
        for name, expert, part in _parts(spec.name, torch.empty(spec.shape, device="meta"), config):
            shapes[name] = tuple(part.shape) if expert is None else (config.n_routed_experts, *part.shape)
    return [
        TensorSpec(name, shape, "F32" if len(shape) == 1 or name.endswith(_ROUTER) else weights) for name, shape in shapes.items()
    ]


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The part of the model that is exported."""
    return replace(config, num_nextn_predict_layers=0)


def _parts(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, int | None, Tensor]]:
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
        yield f"{block}{_LAYER[module]}.{kind}", None, tensor


def write_gguf(path: Path, config: ModelConfig, dtype: str, metadata: Metadata, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a GGUF file from a stream of published (name, tensor) pairs without MTP, in any order and any floating type.

    `metadata` is all but the architecture's name and the file's type; `dtype` one of FILE_TYPES. The stream is drawn one tensor at a
    time. The file appears whole or not at all. Raises InputError if it exists, does not fit on the disk, or a value not into float16.
    """
    specs = gguf_tensors(config, dtype)
    if path.exists():
        raise InputError(f"{path} exists; give a new name")
    path.parent.mkdir(parents=True, exist_ok=True)
    total, free = sum(map(_size, specs)), shutil.disk_usage(path.parent).free
    if free < total:
        raise InputError(f"{path} needs {total / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, or write elsewhere")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        places, end = _write_header(temporary, specs, dtype, metadata)
        with temporary.open("r+b") as file:
            file.truncate(end)
            missing = {spec.name: math.prod(spec.shape) for spec in specs}
            for hf_name, tensor in tensors:
                for name, expert, part in _parts(hf_name, tensor.detach().cpu(), config):
                    start, stored = places[name]
                    values = _cast(hf_name, part, stored)
                    file.seek(start + (expert or 0) * values.nbytes)
                    file.write(values.view(-1).view(torch.uint8).numpy().data)
                    missing[name] -= values.numel()
            assert not any(missing.values()), f"not all of {[name for name, count in missing.items() if count]} was given"
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(path: Path, specs: list[TensorSpec], dtype: str, metadata: Metadata) -> tuple[dict[str, tuple[int, str]], int]:
    """All before the data. Returns where each tensor starts and its type, and where the file ends."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    general = {
        "general.type": "model",
        "general.file_type": FILE_TYPES[dtype][1],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    for key, value in (general | dict(metadata)).items():
        writer.add_key_value(key, value, _value_type(value))
    for spec in specs:  # the library takes no BF16 of numpy's, and ignores this type where it is told the other
        writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float16), _size(spec), GGMLQuantizationType[spec.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment: int = writer.data_alignment

    def aligned(offset: int) -> int:
        return -(-offset // alignment) * alignment

    places, end = {}, aligned(path.stat().st_size)
    for spec in specs:
        places[spec.name] = end, spec.dtype
        end = aligned(end + _size(spec))
    return places, end


def _value_type(value: object) -> Any:
    from gguf import GGUFValueType

    types = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32", list: "ARRAY"}
    return GGUFValueType[types[type(value)]]


def _size(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPE_BYTES[spec.dtype]


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A contiguous tensor of the stored type."""
    if dtype == "F16" and tensor.abs().max() > _LARGEST_F16:
        raise InputError(
            f"{name} holds {tensor.abs().max():g}, beyond float16's {_LARGEST_F16:g}; use --dtype bfloat16 or float32"
        )
    return tensor.to(_TORCH_DTYPES[dtype]).contiguous()
