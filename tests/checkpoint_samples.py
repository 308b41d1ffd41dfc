"""Small models of each kind that a checkpoint can hold, and ways to look into and damage their directories."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finback.config import Llama3RopeScaling, ModelConfig, RopeScaling
from finback.model.transformer import Transformer, init_weights

BASE = ModelConfig(
    vocab_size=96,
    hidden_size=40,
    intermediate_size=72,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=3,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    max_position_embeddings=128,
    q_lora_rank=20,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.2,
    rope_scaling=RopeScaling(4.0, 32, mscale=0.7, mscale_all_dim=0.7),
)


def _changed(**changes: Any) -> ModelConfig:
    return replace(BASE, **changes)


LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    rope_scaling=Llama3RopeScaling(4.0, 1.0, 4.0, 32),
)
QWEN2 = replace(LLAMA, model_type="qwen2", attention_bias=True, rope_scaling=None, bos_token_id=None, eos_token_id=(1, 2))
QWEN3 = replace(LLAMA, model_type="qwen3", head_dim=12, rope_scaling=None, eos_token_id=None)
V2: dict[str, Any] = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False}
CONFIGS = {
    "v3": BASE,
    "v3-mtp": _changed(num_nextn_predict_layers=2),
    "v3-no-query-rank": _changed(q_lora_rank=None, rope_scaling=None),
    "v3-dense": _changed(first_k_dense_replace=3),
    "v3-moe-only": _changed(first_k_dense_replace=0, n_shared_experts=2, num_nextn_predict_layers=1),
    "v2-lite": _changed(**V2, topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2),
    "v2": _changed(**V2, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "llama": LLAMA,
    "llama-tied": replace(LLAMA, tie_word_embeddings=True),
    "llama-biases": replace(LLAMA, attention_bias=True, head_dim=6),
    "qwen2": QWEN2,
    "qwen2-tied": replace(QWEN2, tie_word_embeddings=True),
    "qwen3": QWEN3,
    "qwen3-tied": replace(QWEN3, tie_word_embeddings=True),
}
RAGGED = _changed(  # rows and columns beyond one FP8 block, none of them a multiple
    hidden_size=200, intermediate_size=300, moe_intermediate_size=130, num_hidden_layers=2, num_nextn_predict_layers=1
)


def build(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A model with random weights everywhere: norms and router biases too, so that none can be mistaken for another."""
    model = Transformer(config, dtype=dtype)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.endswith("norm.weight"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.01 if "e_score" in name else 0.2))
    return model


def token_ids(config: ModelConfig, batch: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def raw_bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a directory that has one file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite_config(directory: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    file = directory / "config.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
