"""The presets are what they say: sizes by formula and by building them, published configs, published recipes."""

from dataclasses import replace

import pytest
import torch

from finback.config import ModelConfig, count_params
from finback.model.transformer import Transformer
from finback.presets import PRESETS, small, tiny, v2_lite_16b, v3_671b
from finback.train.config import PretrainConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_the_meta_device_with_as_many_parameters_as_the_formula(name: str) -> None:
    config = PRESETS[name]().model
    model = Transformer(config, device="meta")
    counts = count_params(config)
    # what is stored counts the router biases and repeats embedding and head in each MTP layer
    biases = sum(router.e_score_correction_bias is not None for router in model.routers()) * config.n_routed_experts
    repeated = config.num_nextn_predict_layers * 2 * config.vocab_size * config.hidden_size
    assert sum(p.numel() for p in model.parameters()) == counts.total + counts.mtp - biases - repeated
    assert all(p.device.type == "meta" for p in model.parameters())


def test_published_parameter_counts() -> None:
    assert count_params(v3_671b().model) == (671_026_419_200, 37_552_297_472, 13_463_426_304)
    assert count_params(v2_lite_16b().model).total == 15_706_484_224


def test_tiny_and_small_have_their_promised_sizes() -> None:
    assert 500_000 <= count_params(tiny().model).active <= 5_000_000
    assert tiny().model.max_position_embeddings >= 2048
    assert 90e6 <= count_params(small().model).total <= 115e6
    for config in (tiny().model, small().model):  # the whole architecture, none of it switched off
        assert config.q_lora_rank is not None
        assert config.uses_expert_bias
        assert config.num_nextn_predict_layers == 1
        assert 1 < config.topk_group < config.n_group
        assert 0 < config.first_k_dense_replace < config.num_hidden_layers


def test_v3_is_the_published_config() -> None:
    published = {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    expected = ModelConfig.from_dict(published)
    assert v3_671b().model == replace(expected, initializer_range=0.006)  # the paper's value for training


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    preset = PRESETS[name]()
    assert PretrainConfig.from_dict(preset.to_dict()) == preset


def test_meta_device_needs_no_memory() -> None:
    model = Transformer(v3_671b().model, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) > 1.3e12
