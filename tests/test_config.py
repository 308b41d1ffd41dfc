"""Every published form of config.json is read, the rest is told by name; counts and shapes are DeepSeek's own."""

import contextlib
import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.config import (
    DTYPE_BYTES,
    InputError,
    ModelConfig,
    RopeScaling,
    checkpoint_tensors,
    count_params,
)

CONFIGS = Path(__file__).parent / "data_files" / "configs"
PUBLISHED = [
    "deepseek-v3",
    "deepseek-v3-current",
    "deepseek-r1",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-coder-v2-236b-mscale1.0",
]


def published(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return data


def elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# What is read


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_are_read_as_they_stand(name: str) -> None:
    data = published(name)
    config = ModelConfig.from_dict(data)
    own = {field.name for field in fields(ModelConfig)} - {"rope_scaling", "fp8", "pad_token_id", "head_dim"}
    for field in own - {"num_nextn_predict_layers"}:
        assert getattr(config, field) == data[field], field
    assert config.num_nextn_predict_layers == data.get("num_nextn_predict_layers", 0)
    scaling = {key: value for key, value in data["rope_scaling"].items() if key != "type"}
    assert config.rope_scaling == RopeScaling(**scaling)
    assert config.fp8 == ("quantization_config" in data)


def test_both_v3_forms_and_r1_are_the_same_model() -> None:
    older, current, r1 = (ModelConfig.from_dict(published(name)) for name in PUBLISHED[:3])
    assert older == current == r1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_form_is_written_back(name: str) -> None:
    data = published(name)
    neutral = {"auto_map", "aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux", "transformers_version"}
    assert ModelConfig.from_dict(data).to_dict() == {key: value for key, value in data.items() if key not in neutral}


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_form_is_json_and_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(published(name))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_hf(tmp_path) == config


def test_several_end_tokens_and_a_padding_token_are_kept() -> None:
    config = ModelConfig.from_dict(published("deepseek-v3") | {"eos_token_id": [1, 5], "pad_token_id": 2})
    assert config.eos_token_id == (1, 5)
    assert config.pad_token_id == 2
    assert config.to_dict()["eos_token_id"] == [1, 5]
    assert ModelConfig.from_dict(config.to_dict()) == config


TRANSFORMERS_FORM = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "kv_lora_rank": 8,
    "max_position_embeddings": 64,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "output_router_logits": False,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "q_lora_rank": 16,
    "qk_head_dim": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "v_head_dim": 8,
    "vocab_size": 64,
}


def test_form_that_transformers_saves_is_read() -> None:
    config = ModelConfig.from_dict(TRANSFORMERS_FORM)
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert (config.rope_theta, config.rope_scaling) == (20000.0, None)
    assert config.torch_dtype == "float32"
    assert config.num_nextn_predict_layers == 1
    assert config.qk_head_dim == 12


def test_yarn_in_rope_parameters_is_read() -> None:
    yarn = {
        "rope_theta": 1e4,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
    }
    config = ModelConfig.from_dict(TRANSFORMERS_FORM | {"rope_parameters": yarn})
    assert config.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=0.7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_we_write_and_we_read_what_it_saves(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = ModelConfig.from_dict(published(name))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(config.to_dict()))
    oracle = AutoConfig.from_pretrained(ours)
    implied = {"scoring_func", "topk_method", "torch_dtype", "rope_theta", "rope_scaling", "fp8", "head_dim"}
    for field in {field.name for field in fields(ModelConfig)} - implied - {"num_nextn_predict_layers"}:
        assert getattr(oracle, field) == getattr(config, field), field
    assert str(oracle.dtype) == f"torch.{config.torch_dtype}"
    assert oracle.rope_parameters["rope_theta"] == config.rope_theta
    assert config.rope_scaling is not None
    assert oracle.rope_parameters["factor"] == config.rope_scaling.factor
    assert oracle.rope_parameters["mscale_all_dim"] == config.rope_scaling.mscale_all_dim
    assert getattr(oracle, "num_nextn_predict_layers", 0) == config.num_nextn_predict_layers
    oracle.save_pretrained(theirs)
    assert ModelConfig.from_hf(theirs) == config


def test_default_config_of_transformers_is_v3() -> None:
    from transformers import DeepseekV3Config

    config = ModelConfig.from_dict(DeepseekV3Config().to_dict())
    v3 = ModelConfig.from_dict(published("deepseek-v3"))
    assert config == replace(v3, rope_scaling=None, fp8=False, max_position_embeddings=4096)


# What is told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("tie_word_embeddings", True),
        ("is_encoder_decoder", True),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("torch_dtype", "float64"),
        ("index_topk", 2048),
        ("sliding_window", 4096),
        ("model_type", "deepseek_v32"),
        ("model_type", None),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("quantization_config", {"quant_method": "awq", "bits": 4}),
        ("quantization_config.checkpoint_format", "gptq_v2"),
    ],
)
def test_unsupported_value_is_named_with_its_field(field: str, value: Any) -> None:
    name, _, part = field.partition(".")
    with pytest.raises(InputError, match=rf"config field {field}\b"):
        ModelConfig.from_dict(published("deepseek-v3") | {name: {"quant_method": "gptq", part: value} if part else value})


def test_gptq_is_a_plain_model_whose_tensors_say_how_they_are_packed() -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    config = ModelConfig.from_dict(published("deepseek-v3") | {"quantization_config": quantization})
    assert config == replace(ModelConfig.from_dict(published("deepseek-v3")), fp8=False)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"weight_block_size": [64, 64]},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"strategy": "group"},
    ],
)
def test_unsupported_quantisation_is_named_with_its_field(change: dict[str, Any]) -> None:
    data = published("deepseek-v3")
    data["quantization_config"] = data["quantization_config"] | change
    with pytest.raises(InputError, match=rf"quantization_config\.{list(change)[-1]}"):
        ModelConfig.from_dict(data)


def test_v2_supports_only_its_released_routing() -> None:
    v2 = published("deepseek-v2")
    for field, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("norm_topk_prob", True)):
        with pytest.raises(InputError, match=f"config field {field}"):
            ModelConfig.from_dict(v2 | {field: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "architectures .* model_type deepseek_v3"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures .* model_type deepseek_v3"),
        ({"num_mtp_layers": 2}, r"num_nextn_predict_layers \(1\) and num_mtp_layers \(2\) disagree"),
        ({"dtype": "float32"}, "torch_dtype and dtype disagree"),
        (
            {"rope_parameters": {"rope_theta": 5.0}},
            r"rope_theta \(10000\) and rope_parameters.rope_theta \(5.0\) disagree",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_parameters disagree"),
        ({"qk_head_dim": 128}, "qk_head_dim is 128, but the other fields give 192"),
        ({"head_dim": 128}, "head_dim is 128, but the other fields give 64"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, but the other fields give 128"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace is 62, above num_hidden_layers"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok is 300, above n_routed_experts"),
        ({"n_group": 7}, "n_group is 7, it must divide n_routed_experts"),
        ({"topk_group": 9}, "topk_group is 9, above n_group"),
        ({"n_group": 256}, "groups of one expert"),
        ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok is 33, above the 32 experts"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, it must be even"),
        ({"eos_token_id": 129280}, "eos_token_id is 129280, outside vocab_size"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is -1, outside vocab_size"),
        ({"vocab_size": 0}, "vocab_size is 0, it must be at least 1"),
        ({"hidden_size": 7168.0}, "hidden_size is 7168.0, it must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True, it must be a whole number"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, it must be positive"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, it must be a finite number"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor is '2.5', it must be a finite number"),
    ],
)
def test_contradictory_or_impossible_values_are_errors(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModelConfig.from_dict(published("deepseek-v3") | change)


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_number_that_is_not_finite_is_refused_wherever_it_comes_from(name: str, value: float) -> None:
    """Fields of the command line do not go through a config.json."""
    config = ModelConfig.from_dict(published("deepseek-v3"))
    with pytest.raises(InputError, match=f"config field {name} is .*, it must be positive and finite"):
        replace(config, **{name: value})
    assert config.rope_scaling is not None
    for field in ("factor", "beta_fast"):
        with pytest.raises(InputError, match=f"rope_scaling.{field}"):
            replace(config.rope_scaling, **{field: value})


def test_the_directory_of_a_run_is_no_model_and_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"vocab_size": 3}, "seed": 1}))
    with pytest.raises(InputError, match=r"is the directory of a run; give one of its models, such as .*checkpoints/step-N"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        ModelConfig.from_hf(tmp_path)


def test_v2_has_no_mtp() -> None:
    with pytest.raises(InputError, match="deepseek_v2 has no MTP"):
        ModelConfig.from_dict(published("deepseek-v2") | {"num_nextn_predict_layers": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 0.5}, "rope_scaling.factor is 0.5"),
        ({"factor": None}, "rope_scaling.factor is missing"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"beta_fast": 1}, "rope_scaling.beta_fast"),
        ({"rope_type": "llama3"}, "rope_scaling.type and rope_type disagree"),
        ({"truncate": False}, "rope_scaling.truncate"),
        ({"mscale_all_dims": 1.0}, "rope_scaling.mscale_all_dims .*did you mean 'mscale_all_dim'"),
        ({"type": None}, "has 'beta_fast' but no type"),
    ],
)
def test_yarn_mistakes_are_named(change: dict[str, Any], words: str) -> None:
    data = published("deepseek-v3")
    data["rope_scaling"] = data["rope_scaling"] | change
    with pytest.raises(InputError, match=words):
        ModelConfig.from_dict(data)


def test_neutral_fields_are_ignored_whatever_they_hold() -> None:
    neutral = {
        "aux_loss_alpha": 0.5,
        "ep_size": 8,
        "seq_aux": False,
        "use_cache": False,
        "pretraining_tp": 4,
        "transformers_version": "9.9",
        "auto_map": {},
        "_name_or_path": "somewhere",
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    }
    data = published("deepseek-v3")
    assert ModelConfig.from_dict(data | neutral) == ModelConfig.from_dict(data)


def test_null_turns_an_unknown_feature_off() -> None:
    data = published("deepseek-v3")
    assert ModelConfig.from_dict(data | {"sliding_window": None}) == ModelConfig.from_dict(data)


def test_unknown_field_is_told_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"hiden_size .*did you mean 'hidden_size'"):
        ModelConfig.from_dict(published("deepseek-v3") | {"hiden_size": 1})


def test_missing_fields_are_all_told() -> None:
    data = published("deepseek-v3")
    del data["kv_lora_rank"], data["v_head_dim"]
    with pytest.raises(InputError, match=r"kv_lora_rank is missing; add it \(all missing: kv_lora_rank, v_head_dim\)"):
        ModelConfig.from_dict(data)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "x"]), inner),
    max_leaves=4,
)


@settings(max_examples=300)
@given(data=st.data())
def test_any_json_gives_a_config_or_one_sentence(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([published("deepseek-v3"), published("deepseek-v2"), TRANSFORMERS_FORM]))
    field = data.draw(st.sampled_from([*form, "num_mtp_layers", "rope_parameters", "dtype", "other"]))
    with contextlib.suppress(InputError):  # anything else is a bug
        config = ModelConfig.from_dict(form | {field: data.draw(ANY_JSON)})
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_files_are_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a directory"):
        ModelConfig.from_hf(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        ModelConfig.from_hf(tmp_path)
    file = tmp_path / "config.json"
    for content, words in (
        (b'{"model_type": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1, 2]", "holds list, not a JSON object"),
        (b'{"model_type": "gpt2"}', "model_type is 'gpt2'"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=words) as raised:
            ModelConfig.from_hf(tmp_path)
        assert str(file) in str(raised.value)


# What follows by arithmetic


def test_parameter_counts_are_those_of_the_released_models() -> None:
    v3 = count_params(ModelConfig.from_dict(published("deepseek-v3")))
    assert v3 == (671_026_419_200, 37_552_297_472, 13_463_426_304)
    lite = count_params(ModelConfig.from_dict(published("deepseek-v2-lite")))
    assert (lite.total, lite.mtp) == (15_706_484_224, 0)
    v2 = count_params(ModelConfig.from_dict(published("deepseek-v2")))
    assert round(v2.total / 1e9, 2) == 235.74
    assert round(v2.active / 1e9, 1) == 21.4


def test_tensor_table_is_that_of_the_released_fp8_checkpoint() -> None:
    table = list(checkpoint_tensors(ModelConfig.from_dict(published("deepseek-r1"))))
    assert len(table) == 91_991
    assert len({spec.name for spec in table}) == 91_991
    assert sum(elements(spec.shape) for spec in table) == 684_531_386_000
    assert sum(elements(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in table) == 688_574_839_360
    scales = sum(elements(spec.shape) for spec in table if spec.name.endswith("_scale_inv"))
    assert scales == 41_540_496
    shapes = {spec.name: (list(spec.shape), spec.dtype) for spec in table}
    layer = "model.layers.61."
    assert shapes[layer + "self_attn.kv_a_proj_with_mqa.weight"] == ([576, 7168], "F8_E4M3")
    assert shapes[layer + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ([5, 56], "F32")
    assert shapes[layer + "self_attn.q_b_proj.weight_scale_inv"] == ([192, 12], "F32")
    assert shapes[layer + "self_attn.kv_b_proj.weight_scale_inv"] == ([256, 4], "F32")
    assert shapes[layer + "self_attn.o_proj.weight_scale_inv"] == ([56, 128], "F32")
    assert shapes["model.layers.0.mlp.down_proj.weight_scale_inv"] == ([56, 144], "F32")
    assert shapes[layer + "mlp.experts.255.gate_proj.weight_scale_inv"] == ([16, 56], "F32")
    assert shapes[layer + "mlp.gate.weight"] == ([256, 7168], "BF16")
    assert shapes[layer + "mlp.gate.e_score_correction_bias"] == ([256], "F32")
    assert shapes[layer + "eh_proj.weight"] == ([7168, 14336], "BF16")
    assert shapes[layer + "shared_head.head.weight"] == ([129280, 7168], "BF16")
    assert layer + "eh_proj.weight_scale_inv" not in shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_table_agree(name: str) -> None:
    config = ModelConfig.from_dict(published(name))
    table = list(checkpoint_tensors(config, fp8=False))
    counts = count_params(config)
    assert sum(elements(spec.shape) for spec in table) == counts.total + counts.mtp
    assert counts.active < counts.total
    dtypes = Counter(spec.dtype for spec in table)
    assert dtypes["F32"] == (config.num_moe_layers + config.num_nextn_predict_layers) * config.uses_expert_bias
    assert dtypes["BF16"] == len(table) - dtypes["F32"]


def test_counts_agree_with_transformers_on_small_models() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite"):
        config = replace(ModelConfig.from_dict(published(name)), num_hidden_layers=5, num_nextn_predict_layers=0, fp8=False)
        data = config.to_dict()
        model_type = data.pop("model_type")
        with torch.device("meta"):
            oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **data))
        stored = sum(parameter.numel() for parameter in oracle.parameters())
        biases = config.num_moe_layers * config.n_routed_experts * config.uses_expert_bias
        assert count_params(config).total == stored + biases
