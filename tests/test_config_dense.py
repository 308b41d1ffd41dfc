"""The config.json of Llama, Qwen2 and Qwen3: published forms, what transformers saves, counts, and what is not supported."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.config import InputError, Llama3RopeScaling, ModelConfig, RopeScaling, checkpoint_tensors, count_params

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_2_7B: dict[str, Any] = {  # as first published: no key-value heads, no rope_theta
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
QWEN_2_5_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
R1_DISTILL_QWEN_15B: dict[str, Any] = QWEN_2_5_05B | {
    "bos_token_id": 151646,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
QWEN_3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-2-7b": LLAMA_2_7B,
    "qwen-2.5-0.5b": QWEN_2_5_05B,
    "r1-distill-qwen-1.5b": R1_DISTILL_QWEN_15B,
    "qwen-3-0.6b": QWEN_3_06B,
}
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-7b": 6_738_415_616,
    "qwen-2.5-0.5b": 494_032_768,
    "r1-distill-qwen-1.5b": 1_777_088_000,
    "qwen-3-0.6b": 596_049_920,
}


def elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# What is read and written


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_are_read_as_they_stand(name: str) -> None:
    data, config = PUBLISHED[name], ModelConfig.from_dict(PUBLISHED[name])
    plain = {key: value for key, value in data.items() if hasattr(config, key) and key not in ("rope_scaling", "eos_token_id")}
    assert {key: getattr(config, key) for key in plain} == plain
    assert config.kv_lora_rank == config.n_routed_experts == config.num_moe_layers == config.n_shared_experts == 0
    assert config.first_k_dense_replace == config.num_hidden_layers
    assert not config.uses_expert_bias


def test_what_files_leave_out_is_what_the_families_imply() -> None:
    llama2, qwen2, qwen3 = (ModelConfig.from_dict(data) for data in (LLAMA_2_7B, QWEN_2_5_05B, QWEN_3_06B))
    assert (llama2.num_key_value_heads, llama2.head_dim, llama2.rope_theta) == (32, 128, 10000.0)
    assert (qwen2.head_dim, qwen2.attention_bias, qwen2.uses_output_bias, qwen2.uses_qk_norm) == (64, True, False, False)
    assert (qwen3.head_dim, qwen3.attention_bias, qwen3.uses_qk_norm) == (128, False, True)
    llama31 = ModelConfig.from_dict(LLAMA_3_1_8B)
    assert llama31.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    assert llama31.eos_token_id == (128001, 128008, 128009)
    bare = {key: value for key, value in LLAMA_2_7B.items() if key not in ("bos_token_id", "eos_token_id", "initializer_range")}
    assert ModelConfig.from_dict(bare) == llama2
    assert ModelConfig.from_dict(LLAMA_2_7B | {"attention_bias": True}).uses_output_bias


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_form_is_json_and_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(PUBLISHED[name])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_hf(tmp_path) == config
    assert set(PUBLISHED[name]) - set(config.to_dict()) <= {
        "max_window_layers", "sliding_window", "use_mrope", "transformers_version", "pretraining_tp",
    }  # fmt: skip
    assert not any(name.startswith(("n_", "kv_", "qk_", "moe_", "topk_")) for name in config.to_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_we_write_and_we_read_what_it_saves(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = ModelConfig.from_dict(PUBLISHED[name])
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(config.to_dict()))
    oracle = AutoConfig.from_pretrained(ours)
    for field in config.to_dict():
        if field not in ("architectures", "torch_dtype", "rope_theta", "rope_scaling", "eos_token_id"):
            assert getattr(oracle, field) == config.to_dict()[field], field
    assert oracle.rope_parameters["rope_theta"] == config.rope_theta
    assert oracle.rope_parameters["rope_type"] == ("default" if config.rope_scaling is None else "llama3")
    oracle.save_pretrained(theirs)
    saved = json.loads((theirs / "config.json").read_text())
    assert "rope_parameters" in saved  # the other form
    assert ModelConfig.from_hf(theirs) == config


@pytest.mark.parametrize("scaling", [{"type": "yarn"}, {"rope_type": "yarn"}])
def test_yarn_of_qwen_is_read(scaling: dict[str, Any]) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768} | scaling
    assert ModelConfig.from_dict(QWEN_2_5_05B | {"rope_scaling": yarn}).rope_scaling == RopeScaling(4.0, 32768)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_default_configs_of_transformers_are_read(model_type: str) -> None:
    from transformers import AutoConfig

    config = ModelConfig.from_dict(AutoConfig.for_model(model_type).to_dict())
    assert (config.model_type, config.num_attention_heads, config.head_dim) == (model_type, 32, 128)


# What is told


@pytest.mark.parametrize(
    ("data", "change", "words"),
    [
        (LLAMA_3_1_8B, {"mlp_bias": True}, "mlp_bias is True, only False is supported"),
        (LLAMA_3_1_8B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA_3_1_8B, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (LLAMA_3_1_8B, {"attention_bias": "yes"}, "attention_bias is 'yes', it must be true or false"),
        (LLAMA_3_1_8B, {"sliding_window": 4096}, "sliding_window is 4096 and in use"),
        (LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA_3_1_8B, {"n_routed_experts": 8}, r"n_routed_experts \(8\) is not supported"),
        (LLAMA_3_1_8B, {"kv_lora_rank": 512}, r"kv_lora_rank \(512\) is not supported"),
        (LLAMA_3_1_8B, {"num_key_value_heads": 5}, "num_key_value_heads is 5, it must divide num_attention_heads"),
        (LLAMA_3_1_8B, {"num_key_value_heads": 0}, "num_key_value_heads is 0, it must be at least 1"),
        (LLAMA_3_1_8B, {"head_dim": 127}, "head_dim is 127, it must be even"),
        (LLAMA_3_1_8B, {"head_dim": -2}, "head_dim is -2, it must be at least 1"),
        (LLAMA_3_1_8B, {"hidden_size": 4095}, "hidden_size is 4095, it must be a multiple of num_attention_heads"),
        (LLAMA_3_1_8B, {"num_attention_heads": 0}, "num_attention_heads is 0, it must be at least 1"),
        (LLAMA_3_1_8B, {"architectures": ["MistralForCausalLM"]}, "architectures .* model_type llama"),
        (LLAMA_3_1_8B, {"model_type": "mistral"}, "model_type is 'mistral', supported are .*llama, qwen2, qwen3"),
        (LLAMA_3_1_8B, {"eos_token_id": 128256}, "eos_token_id is 128256, outside vocab_size"),
        (LLAMA_3_1_8B, {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
        (QWEN_2_5_05B, {"attention_bias": False}, "attention_bias is False, but qwen2 always has"),
        (QWEN_2_5_05B, {"use_sliding_window": True}, "sliding_window is 32768 and in use, only full attention"),
        (QWEN_2_5_05B, {"use_sliding_window": 1}, "use_sliding_window is 1, it must be true or false"),
        (QWEN_2_5_05B, {"use_mrope": True}, "use_mrope is True"),
        (QWEN_2_5_05B, {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, "layer_types is .*sliding_attention"),
        (QWEN_2_5_05B, {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, but num_hidden_layers is 24"),
        (QWEN_2_5_05B, {"layer_types": "full_attention"}, "layer_types is 'full_attention', supported is"),
        (QWEN_2_5_05B, {"num_key_value_heads": None}, "num_key_value_heads is missing; add it"),
        (QWEN_3_06B, {"head_dim": None}, "head_dim is missing; add it"),
        (QWEN_3_06B, {"hiden_size": 1}, "hiden_size .*did you mean 'hidden_size'"),
    ],
)
def test_unsupported_or_impossible_values_are_named(data: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"config field {words}"):
        ModelConfig.from_dict(data | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_type": "linear"}, r"rope_scaling\.type is 'linear', supported are 'yarn', 'llama3' and null"),
        ({"factor": 0.5}, r"rope_scaling\.factor is 0.5, it must be at least 1"),
        ({"factor": None}, r"rope_scaling\.factor is missing"),
        ({"low_freq_factor": None}, r"rope_scaling\.low_freq_factor is missing"),
        ({"low_freq_factor": 4.0}, r"rope_scaling\.low_freq_factor is 4.0, it must be above 0 and below high_freq_factor"),
        ({"low_freq_factor": 0}, r"rope_scaling\.low_freq_factor is 0.0"),
        ({"original_max_position_embeddings": 8192.5}, r"rope_scaling\.original_max_position_embeddings is 8192.5"),
        ({"beta_fast": 32}, r"rope_scaling\.beta_fast is not supported"),
        ({"type": "yarn"}, r"rope_scaling\.type and rope_type disagree"),
    ],
)
def test_mistakes_in_the_scaling_of_llama_3_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModelConfig.from_dict(LLAMA_3_1_8B | {"rope_scaling": LLAMA3_SCALING | change})


def test_deepseek_files_do_not_take_the_scaling_of_llama() -> None:
    deepseek = json.loads((Path(__file__).parent / "data_files" / "configs" / "deepseek-v3.json").read_text())
    with pytest.raises(InputError, match=r"rope_scaling\.type is 'llama3', supported are 'yarn' and null"):
        ModelConfig.from_dict(deepseek | {"rope_scaling": LLAMA3_SCALING})
    with pytest.raises(InputError, match="rope_scaling is Llama's, deepseek_v3 supports YaRN"):
        replace(ModelConfig.from_dict(deepseek), rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lora_rank": 8}, "kv_lora_rank is 8, but llama is a dense model without it; use 0"),
        ({"n_routed_experts": 8}, "n_routed_experts is 8, but llama is a dense model"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1, but llama is a dense model"),
        ({"q_lora_rank": 8}, "q_lora_rank is 8, but llama is a dense model"),
        ({"model_type": "qwen2"}, "attention_bias is False, but qwen2 always has"),
        ({"model_type": "deepseek_v3", "head_dim": 0}, "moe_intermediate_size is 0, it must be at least 1"),
    ],
)
def test_a_dense_config_made_in_python_has_no_experts_and_no_latent(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(ModelConfig.from_dict(LLAMA_2_7B), **change)


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias"])
def test_a_deepseek_config_made_in_python_has_no_tied_head_and_no_biases(field: str) -> None:
    deepseek = json.loads((Path(__file__).parent / "data_files" / "configs" / "deepseek-v3.json").read_text())
    with pytest.raises(InputError, match=f"{field} is True, which deepseek_v3 does not have"):
        replace(ModelConfig.from_dict(deepseek), **{field: True})


def test_a_window_that_is_switched_off_may_have_any_size() -> None:
    expected = ModelConfig.from_dict(QWEN_2_5_05B)
    for change in (
        {"sliding_window": None},
        {"use_sliding_window": True, "sliding_window": None},
        {"max_window_layers": 3},
        {"layer_types": ["full_attention"] * 24},
    ):
        assert ModelConfig.from_dict(QWEN_2_5_05B | change) == expected


def test_layers_follow_when_they_change() -> None:
    config = replace(ModelConfig.from_dict(QWEN_3_06B), num_hidden_layers=5)
    assert config.first_k_dense_replace == 5
    assert config.num_moe_layers == 0


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "x"]), inner),
    max_leaves=4,
)


@settings(max_examples=300)
@given(data=st.data())
def test_any_json_gives_a_config_or_one_sentence(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(list(PUBLISHED.values())))
    field = data.draw(st.sampled_from([*form, "layer_types", "rope_parameters", "sliding_window", "head_dim", "dtype", "other"]))
    with contextlib.suppress(InputError):  # anything else is a bug
        config = ModelConfig.from_dict(form | {field: data.draw(ANY_JSON)})
        assert ModelConfig.from_dict(config.to_dict()) == config


# What follows by arithmetic


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_those_of_the_released_models(name: str) -> None:
    config = ModelConfig.from_dict(PUBLISHED[name])
    assert count_params(config) == (PARAMETERS[name], PARAMETERS[name], 0)
    table = list(checkpoint_tensors(config))
    assert sum(elements(spec.shape) for spec in table) == PARAMETERS[name]
    assert {spec.dtype for spec in table} == {"F16" if name == "llama-2-7b" else "BF16"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_transformers(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    data = ModelConfig.from_dict(PUBLISHED[name]).to_dict() | {"num_hidden_layers": 2}
    config = ModelConfig.from_dict(data)
    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(data.pop("model_type"), **data))
    expected = {parameter_name: tuple(parameter.shape) for parameter_name, parameter in oracle.named_parameters()}
    assert {spec.name: spec.shape for spec in checkpoint_tensors(config)} == expected


def test_the_cache_row_is_as_wide_as_keys_and_values() -> None:
    assert ModelConfig.from_dict(LLAMA_3_1_8B).cache_row_width == 2 * 8 * 128
    deepseek = json.loads((Path(__file__).parent / "data_files" / "configs" / "deepseek-v3.json").read_text())
    assert ModelConfig.from_dict(deepseek).cache_row_width == 576
