"""The model that both sides run, and transformers' DeepseekV3 with our weights."""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from finback.config import ModelConfig
from finback.model.transformer import Transformer, init_weights

# The comparison model: 12.49M parameters, 6.59M of them active.
COMPARED = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=640,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_position_embeddings=4096,
    initializer_range=0.02,
)

# transformers by itself picks sdpa and grouped_mm. Its plain implementations are sometimes faster on a CPU, so both are peers.
# (Its third choice for experts, batched_mm, copies the weights of four experts for every token: over 20 GB in training.)
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "transformers": {},
    "transformers, eager": {"attn_implementation": "eager", "experts_implementation": "eager"},
}


def our_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """Our model with the weights of seed 0."""
    model = Transformer(config)
    init_weights(model, seed=0)
    return model.to(dtype)


def their_model(config: ModelConfig, settings: Mapping[str, str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model with the same weights. It has no MTP, so `config` must have none."""
    return their_twin(our_model(config), settings).to(dtype)


def their_twin(model: Transformer, settings: Mapping[str, str]) -> nn.Module:
    """transformers' model with the weights of a DeepseekV3 model of ours, MTP layers left out."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = model.config
    other: Any = DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(config.to_dict(), **settings))
    mtp = tuple(f"model.layers.{config.num_hidden_layers + depth}." for depth in range(config.num_nextn_predict_layers))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(mtp)}
    other.load_state_dict(_their_names(state), strict=True)
    moved: nn.Module = other.to(model.lm_head.weight.dtype)
    return moved


def their_mtp(model: Transformer, main: nn.Module) -> nn.Module:
    """transformers' MTP layers over `main`, its `their_twin`, with our weights. (Its own loader reads those of layer 61 only.)"""
    from transformers.modeling_layers import MtpModel

    other: Any = MtpModel(main, len(model.mtp_modules)).eval()
    state = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("layers.")}
    for depth, module in enumerate(model.mtp_modules):
        for name, tensor in _their_names(dict(module.state_dict())).items():
            prefix = f"layers.{depth}."
            if name.startswith("shared_head.norm"):
                name = name.replace("shared_head.norm", "post_norm")
            elif not name.startswith(("enorm", "hnorm", "eh_proj")):
                prefix += "mtp_block."
            state[prefix + name] = tensor
    other.load_state_dict(state, strict=True)
    moved: nn.Module = other.to(model.lm_head.weight.dtype)
    return moved


def peer_versions() -> dict[str, str]:
    """Versions of the libraries that we are compared with; TRL's where it is installed."""
    names = ("transformers", "safetensors", *(("trl",) if find_spec("trl") is not None else ()))
    return {name: version(name) for name in names}


def _their_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> theirs: they stack the gate and up projections of the experts into one tensor."""
    theirs = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_proj"):
            theirs[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                (tensor, state[name.replace("gate_proj", "up_proj")]), dim=1
            )
        elif not name.endswith("experts.up_proj"):
            theirs[name] = tensor
    return theirs
