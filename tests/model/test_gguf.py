"""GGUF files read back: every tensor is ours bit for bit, once what llama.cpp wants otherwise is undone."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from finback.config import InputError, Llama3RopeScaling, ModelConfig, RopeScaling
from finback.model.checkpoint import hf_tensors
from finback.model.gguf import write_gguf
from finback.model.gguf_layout import check_exportable, gguf_tensors, hyperparameters, without_mtp
from finback.model.transformer import Transformer
from finback.ops.rotary import inverse_frequencies, softmax_scale, yarn_table_scale
from tests.checkpoint_samples import BASE, CONFIGS, LLAMA, QWEN2, QWEN3, V2, build, raw_bytes

EXPORTED = {name: config for name, config in CONFIGS.items() if name != "v2"}
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def stream(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    names = {name for name, _ in hf_tensors(model)}
    layers = model.config.num_hidden_layers
    mtp = {name for name in names if name.startswith("model.layers.") and int(name.split(".")[2]) >= layers}
    yield from ((name, tensor) for name, tensor in hf_tensors(model) if name not in mtp)


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, in torch's order of dimensions."""
    reader = GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        data = torch.from_numpy(np.frombuffer(tensor.data.tobytes(), dtype=np.uint8).copy())
        tensors[tensor.name] = data.view(TORCH[tensor.tensor_type.name]).view([int(n) for n in reversed(tensor.shape)])
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def undone(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The published tensors, computed back from those of the file."""
    c = config
    ours = {"model.embed_tokens.weight": tensors.pop("token_embd.weight"), "model.norm.weight": tensors.pop("output_norm.weight")}
    if not c.tie_word_embeddings:
        ours["lm_head.weight"] = tensors.pop("output.weight")
    if isinstance(c.rope_scaling, Llama3RopeScaling):
        divisors = tensors.pop("rope_freqs.weight")
        plain_frequencies = inverse_frequencies(replace(c, rope_scaling=None))
        torch.testing.assert_close(plain_frequencies / divisors, inverse_frequencies(c))
    plain = {
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
        "attn_k.weight": "self_attn.k_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_q.bias": "self_attn.q_proj.bias",
        "attn_k.bias": "self_attn.k_proj.bias",
        "attn_v.bias": "self_attn.v_proj.bias",
        "attn_output.bias": "self_attn.o_proj.bias",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_q_a.weight": "self_attn.q_a_proj.weight",
        "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
        "attn_q_b.weight": "self_attn.q_b_proj.weight",
        "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_gate_inp.weight": "mlp.gate.weight",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    }
    for layer in range(c.num_hidden_layers):
        block, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        for theirs, name in plain.items():
            if block + theirs in tensors:
                value = tensors.pop(block + theirs)
                if c.model_type == "llama" and theirs.startswith(("attn_q.", "attn_k.")):
                    rows = value.view(-1, c.head_dim, *value.shape[1:])  # pairs are neighbours: first all evens, then all odds
                    value = torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1).view(value.shape)
                ours[prefix + name] = value
        for kind in ("gate", "up", "down"):
            if layer < c.first_k_dense_replace:
                ours[f"{prefix}mlp.{kind}_proj.weight"] = tensors.pop(f"{block}ffn_{kind}.weight")
                continue
            ours[f"{prefix}mlp.shared_experts.{kind}_proj.weight"] = tensors.pop(f"{block}ffn_{kind}_shexp.weight")
            stack = tensors.pop(f"{block}ffn_{kind}_exps.weight")
            for expert, weight in enumerate(stack):
                ours[f"{prefix}mlp.experts.{expert}.{kind}_proj.weight"] = weight
        if not c.kv_lora_rank:
            continue
        keys, values = tensors.pop(block + "attn_k_b.weight"), tensors.pop(block + "attn_v_b.weight")
        heads = torch.cat((keys.transpose(1, 2), values), dim=1)
        ours[prefix + "self_attn.kv_b_proj.weight"] = heads.reshape(-1, c.kv_lora_rank)
    assert tensors == {}
    return ours


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", EXPORTED)
def test_every_tensor_is_ours(name: str, dtype: str, tmp_path: Path) -> None:
    model = build(EXPORTED[name])
    write_gguf(tmp_path / "model.gguf", model.config, dtype, {}, stream(model))
    metadata, tensors = read_back(tmp_path / "model.gguf")
    assert [tmp_path / "model.gguf"] == list(tmp_path.iterdir())
    assert metadata["general.file_type"] == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]
    assert [(spec.name, spec.shape, spec.dtype) for spec in gguf_tensors(model.config, dtype)] == [
        (key, tuple(tensor.shape), {value: key for key, value in TORCH.items()}[tensor.dtype]) for key, tensor in tensors.items()
    ]
    stored, expected = undone(tensors, model.config), dict(stream(model))
    assert stored.keys() == expected.keys()
    for key, tensor in expected.items():
        plain = tensor.dim() == 1 or key.endswith("mlp.gate.weight")
        cast = tensor if plain else tensor.to(TORCH[NAMES[dtype]])
        assert raw_bytes(stored[key]) == raw_bytes(cast), key


def test_latent_split_computes_the_same_attention(tmp_path: Path) -> None:
    """q k^T over expanded keys equals (q k_b) latent^T, which is how llama.cpp uses its two stacks."""
    model = build(BASE)
    write_gguf(tmp_path / "model.gguf", BASE, "float32", {}, stream(model))
    _, tensors = read_back(tmp_path / "model.gguf")
    latent, query = torch.randn(5, BASE.kv_lora_rank), torch.randn(BASE.num_attention_heads, BASE.qk_nope_head_dim)
    expanded = model.blocks[0].self_attn.kv_b_proj(latent).view(5, BASE.num_attention_heads, -1)
    keys, values = expanded.split([BASE.qk_nope_head_dim, BASE.v_head_dim], dim=-1)
    scores = torch.einsum("hn,thn->ht", query, keys)
    theirs = torch.einsum("hc,tc->ht", torch.einsum("hcn,hn->hc", tensors["blk.0.attn_k_b.weight"], query), latent)
    torch.testing.assert_close(theirs, scores)
    torch.testing.assert_close(torch.einsum("hvc,tc->thv", tensors["blk.0.attn_v_b.weight"], latent), values)


def test_hyperparameters_are_what_llama_cpp_reads() -> None:
    expected = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 40,
        "feed_forward_length": 72,
        "vocab_size": 96,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,  # one latent for all heads
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.q_lora_rank": 20,
        "attention.kv_lora_rank": 16,
        "attention.key_length": 20,
        "attention.value_length": 16,
        "attention.key_length_mla": 12,
        "attention.value_length_mla": 12,
        "leading_dense_block_count": 1,
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 24,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "rope.dimension_count": 4,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.07, abs=1e-12),
    }
    assert hyperparameters(BASE) == {f"deepseek2.{key}": value for key, value in expected.items()}


def test_dense_hyperparameters_are_what_llama_cpp_reads() -> None:
    expected = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 40,
        "feed_forward_length": 72,
        "vocab_size": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 12,
        "attention.value_length": 12,
        "rope.dimension_count": 12,
        "rope.freq_base": 10000.0,
    }
    assert hyperparameters(QWEN3) == {f"qwen3.{key}": value for key, value in expected.items()}
    expected |= {"attention.key_length": 10, "attention.value_length": 10, "rope.dimension_count": 10}
    assert hyperparameters(QWEN2) == {f"qwen2.{key}": value for key, value in expected.items()}
    assert hyperparameters(LLAMA) == {f"llama.{key}": value for key, value in expected.items()}  # its scaling is a tensor


def test_metadata_keeps_its_types(tmp_path: Path) -> None:
    metadata = {"a": "text", "b": True, "c": 7, "d": 0.5, "e": ["x", "y"], "f": [1, 2]}
    write_gguf(tmp_path / "model.gguf", BASE, "float32", {**metadata, **hyperparameters(BASE)}, stream(build(BASE)))
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert {key: fields[key].contents() for key in metadata} == metadata
    types = {key: [kind.name for kind in fields[key].types] for key in metadata}
    assert types == {
        "a": ["STRING"], "b": ["BOOL"], "c": ["UINT32"], "d": ["FLOAT32"], "e": ["ARRAY", "STRING"], "f": ["ARRAY", "INT32"],
    }  # fmt: skip
    assert fields["general.architecture"].contents() == "deepseek2"
    assert fields["general.quantization_version"].contents() == 2


@pytest.mark.parametrize(
    ("mscale", "all_dim"),
    [(1.0, 1.0), (0.707, 0.707), (None, None), (None, 1.0), (0.5, 1.5), (1.0, 0.5), (1.0, None), (None, 0.3)],
)
def test_yarn_scales_are_those_that_llama_cpp_arrives_at(mscale: float | None, all_dim: float | None) -> None:
    config = replace(BASE, rope_scaling=RopeScaling(40.0, 64, mscale=mscale, mscale_all_dim=all_dim))
    keys = hyperparameters(config)
    # From its llama-context.cpp and models/deepseek2.cpp: the log multiplier is divided by 0.1 first.
    logarithm = 0.1 * math.log(40)
    multiplier = float(str(keys.get("deepseek2.rope.scaling.yarn_log_multiplier", 0.0))) / 0.1
    table = float(str(keys.get("deepseek2.rope.scaling.attn_factor", 1.0)))
    if multiplier == 0:
        table *= 1 + logarithm
    softmax = (table * (1 + multiplier * logarithm)) ** 2 / math.sqrt(config.qk_head_dim)
    assert table == pytest.approx(yarn_table_scale(config.rope_scaling), rel=1e-6)
    assert softmax == pytest.approx(softmax_scale(config), rel=1e-6)


@pytest.mark.parametrize(("mscale", "all_dim"), [(None, None), (1.0, 1.0), (1.0, 0.5)])
def test_yarn_of_dense_models_leaves_the_softmax_alone(mscale: float | None, all_dim: float | None) -> None:
    config = replace(QWEN2, rope_scaling=RopeScaling(4.0, 32, mscale=mscale, mscale_all_dim=all_dim))
    keys = hyperparameters(config)
    assert "qwen2.rope.scaling.yarn_log_multiplier" not in keys
    table = float(str(keys.get("qwen2.rope.scaling.attn_factor", 1.0))) * (1 + 0.1 * math.log(4))
    assert table == pytest.approx(yarn_table_scale(config.rope_scaling), rel=1e-6)
    assert ("qwen2.rope.scaling.attn_factor" in keys) == (mscale is not None)


def test_yarn_of_factor_one_is_none() -> None:
    assert hyperparameters(replace(BASE, rope_scaling=RopeScaling(1.0, 32))) == hyperparameters(replace(BASE, rope_scaling=None))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rope_scaling": RopeScaling(4.0, 32, 16.0)},
            "beta_fast and beta_slow are 16.0 and 1.0: llama.cpp computes with 32.0",
        ),
        ({**V2, "topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy' with topk_group 2 of n_group 4"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05: llama.cpp would use it for the latent norms too"),
        ({"num_hidden_layers": 27}, "q_lora_rank is 20, but llama.cpp takes a model of 27 layers for V2-Lite"),
        ({"num_hidden_layers": 48, "vocab_size": 128256}, "q_lora_rank is 20, but llama.cpp takes a model of 48 layers"),
        ({"num_hidden_layers": 513}, "num_hidden_layers is 513, llama.cpp has room for 512"),
        ({"n_routed_experts": 1028}, "n_routed_experts is 1028, llama.cpp has room for 1024"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        check_exportable(replace(BASE, **changes))
    assert sentence in str(error.value)
    assert "become GGUF" in str(error.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (replace(QWEN3, attention_bias=True), "attention_bias is True, and llama.cpp's qwen3 has no bias after attention"),
        (replace(QWEN2, head_dim=12), "head_dim is 12, but llama.cpp's qwen2 wants hidden_size / num_attention_heads (40 / 4)"),
        (
            replace(QWEN3, rope_scaling=LLAMA.rope_scaling),
            "rope_scaling is Llama 3's, which llama.cpp does not compute for qwen3",
        ),
    ],
)
def test_dense_model_that_llama_cpp_has_not_is_refused(config: ModelConfig, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        check_exportable(config)
    assert sentence in str(error.value)


def test_what_only_looks_like_it_is_exported() -> None:
    for config in (LLAMA, QWEN2, QWEN3, replace(LLAMA, attention_bias=True, head_dim=6), replace(LLAMA, rms_norm_eps=1e-5)):
        check_exportable(config)
    for changes in (
        {},
        {**V2, "topk_method": "greedy"},
        {**V2, "topk_method": "group_limited_greedy", "topk_group": 4},
        {"num_hidden_layers": 27, "q_lora_rank": None},
        {"num_hidden_layers": 48},
    ):
        check_exportable(replace(BASE, **changes))
    for changes in ({**V2, "topk_method": "greedy"}, {"topk_group": 4}):
        keys = hyperparameters(replace(BASE, **changes))
        assert not [key for key in keys if "group" in key]  # llama.cpp's assertions want fewer used groups than groups


def test_value_beyond_float16_is_named(tmp_path: Path) -> None:
    model = build(BASE)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = -70000.0
    with pytest.raises(InputError, match=r"output\.weight holds 70000, beyond float16's 65504; use --dtype bfloat16 or float32"):
        write_gguf(tmp_path / "model.gguf", BASE, "float16", {}, stream(model))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_or_left_half(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def breaks() -> Iterator[tuple[str, Tensor]]:
        yield next(stream(build(BASE)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, BASE, "float32", {}, breaks())
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(InputError, match="exists; give a new name"):
        write_gguf(path, BASE, "float32", {}, stream(build(BASE)))
    assert path.read_text() == "mine"


def test_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("finback.model.gguf.shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="MB are free; make room, or write elsewhere"):
        write_gguf(tmp_path / "model.gguf", BASE, "float32", {}, stream(build(BASE)))
    assert list(tmp_path.iterdir()) == []


def test_incomplete_stream_is_noticed(tmp_path: Path) -> None:
    tensors = list(stream(build(BASE)))[:-1]
    with pytest.raises(AssertionError, match=r"output\.weight"):
        write_gguf(tmp_path / "model.gguf", BASE, "float32", {}, iter(tensors))
    assert list(tmp_path.iterdir()) == []


def test_mtp_is_not_planned() -> None:
    with_mtp = CONFIGS["v3-mtp"]
    assert gguf_tensors(with_mtp, "float32") == gguf_tensors(without_mtp(with_mtp), "float32")
