"""Hugging Face directories: bit-exact round trips, FP8, transformers both ways, and one sentence for whatever is wrong."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import finback
from finback.config import InputError, ModelConfig, checkpoint_tensors
from finback.model.checkpoint import hf_tensors, load, save, write_checkpoint
from finback.model.safetensors_io import read_catalog
from finback.ops.fp8 import dequantize_128x128
from tests.checkpoint_samples import (
    BASE,
    CONFIGS,
    RAGGED,
    build,
    file_bytes,
    raw_bytes,
    rewrite_config,
    rewrite_tensors,
    token_ids,
)

DTYPES = [torch.float32, torch.bfloat16]
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


Change = Callable[[dict[str, Tensor]], None]


def drop(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def put(name: str, tensor: Tensor) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return change


def rename(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert raw_bytes(tensor) == raw_bytes(theirs[name]), name


# (hf_name, tensor) pairs


@pytest.mark.parametrize("kind", CONFIGS)
def test_pairs_are_the_table_of_the_checkpoint(kind: str) -> None:
    model = build(CONFIGS[kind])
    pairs = [(name, tuple(tensor.shape)) for name, tensor in hf_tensors(model)]
    assert pairs == [(spec.name, spec.shape) for spec in checkpoint_tensors(model.config, fp8=False)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_pairs_are_views_of_the_model(kind: str) -> None:
    model = build(CONFIGS[kind])
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for name, tensor in hf_tensors(model):
        assert tensor.untyped_storage().data_ptr() in storages, name
        assert not tensor.requires_grad
        tensor.fill_(3.0)
    assert all((tensor == 3).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_come_once_for_each_parameter(kind: str) -> None:
    model = build(CONFIGS[kind])
    assert list(hf_tensors(model, grads=True)) == []
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
        if parameter.dim() == 3:  # experts: a value each
            parameter.grad += torch.arange(parameter.shape[0])[:, None, None] / 1000
    gradients = dict(hf_tensors(model, grads=True))
    weights = dict(hf_tensors(model))
    assert sum(gradient.numel() for gradient in gradients.values()) == sum(p.numel() for p in model.parameters())
    missing = {name for name in weights if name not in gradients}
    mtp = [f"model.layers.{3 + depth}." for depth in range(model.config.num_nextn_predict_layers)]
    copies = {prefix + name for prefix in mtp for name in ("embed_tokens.weight", "shared_head.head.weight")}
    assert missing == copies | {name for name in weights if name.endswith("e_score_correction_bias")}
    assert {name: gradient.shape for name, gradient in gradients.items()} == {name: weights[name].shape for name in gradients}
    if EXPERT in gradients:
        stacked = model.get_parameter("model.layers.1.mlp.experts.up_proj").grad
        assert stacked is not None
        assert torch.equal(gradients[EXPERT], stacked[5])


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_is_bit_exact(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(CONFIGS[kind], dtype)
    save(model, tmp_path / "once")
    again = load(tmp_path / "once", dtype=dtype)
    assert_equal_weights(model, again)
    assert again.config == replace(model.config, torch_dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(model(token_ids(model.config)), again(token_ids(model.config)))
    save(again, tmp_path / "twice")
    assert file_bytes(tmp_path / "once") == file_bytes(tmp_path / "twice")


@pytest.mark.parametrize("kind", CONFIGS)
def test_file_holds_the_table_in_the_models_dtype(kind: str, tmp_path: Path) -> None:
    model = build(CONFIGS[kind], torch.bfloat16)
    save(model, tmp_path)
    stored = {name: (entry.dtype, entry.shape) for name, entry in read_catalog(tmp_path).items()}
    config = replace(model.config, torch_dtype="bfloat16")
    assert stored == {spec.name: (spec.dtype, spec.shape) for spec in checkpoint_tensors(config)}
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    if kind.startswith("v"):
        assert generation == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}


def test_loading_casts_all_but_the_router_bias(tmp_path: Path) -> None:
    model = build(CONFIGS["v3-mtp"])
    save(model, tmp_path)
    narrow = load(tmp_path, dtype=torch.bfloat16)
    for name, tensor in narrow.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(tensor, expected if name.endswith("bias") else expected.to(torch.bfloat16)), name
    assert narrow.config.torch_dtype == "bfloat16"
    save(narrow, tmp_path / "narrow")
    wide = load(tmp_path / "narrow")
    assert wide.config.torch_dtype == "float32"
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, narrow.state_dict()[name].float()), name


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    model = build(CONFIGS["v3-mtp"])
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_bytes=50_000)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    count = len(names)
    assert count > 3
    assert names == [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = stored_tensors(tmp_path / "one")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_equal_weights(load(tmp_path / "many"), model)


def test_public_names_are_these_functions(tmp_path: Path) -> None:
    finback.save(build(BASE), tmp_path)
    assert_equal_weights(finback.load(tmp_path), build(BASE))
    assert [name for name, _ in finback.hf_tensors(build(BASE))] == [spec.name for spec in checkpoint_tensors(BASE)]


# FP8


DEPTHS = pytest.mark.parametrize("depths", [0, 1], ids=["no MTP", "MTP"])


def make_deepseek_like(directory: Path, depths: int = 1, seed: int = 0) -> None:
    """An FP8 directory whose blocks all reach the largest code, with arbitrary float32 scales, as DeepSeek's are."""
    save(build(replace(RAGGED, num_nextn_predict_layers=depths), torch.bfloat16), directory, fp8=True)
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = torch.rand(tensors[name].shape, generator=generator) * 1e-3 + 1e-5

    rewrite_tensors(directory, change)


def payloads_and_scales(directory: Path) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    tensors = stored_tensors(directory)
    payloads = {name: raw_bytes(tensor) for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    return payloads, scales


@DEPTHS
def test_fp8_directory_has_deepseeks_layout(tmp_path: Path, depths: int) -> None:
    ragged = replace(RAGGED, num_nextn_predict_layers=depths)
    model = build(ragged, torch.bfloat16)
    save(model, tmp_path, fp8=True, max_shard_bytes=300_000)
    config = ModelConfig.from_hf(tmp_path)
    assert config == replace(ragged, torch_dtype="bfloat16", fp8=True)
    stored = {name: (entry.dtype, entry.shape) for name, entry in read_catalog(tmp_path).items()}
    assert stored == {spec.name: (spec.dtype, spec.shape) for spec in checkpoint_tensors(config)}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(index[name] == index[name.removesuffix("_scale_inv")] for name in index)
    for name, _ in hf_tensors(model):
        is_fp8 = name + "_scale_inv" in stored
        assert is_fp8 == (name.split(".")[-2].endswith(("_proj", "_proj_with_mqa")) and "eh_proj" not in name), name


def test_fp8_weights_are_payload_times_scale(tmp_path: Path) -> None:
    make_deepseek_like(tmp_path)
    tensors = stored_tensors(tmp_path)
    for dtype in DTYPES:
        for name, weight in hf_tensors(load(tmp_path, dtype=dtype)):
            expected = tensors[name]
            if name + "_scale_inv" in tensors:
                expected = dequantize_128x128(expected, tensors[name + "_scale_inv"])
            wanted = torch.float32 if name.endswith("bias") else dtype
            assert torch.equal(weight, expected.to(wanted)), name


@DEPTHS
def test_fp8_comes_back_with_the_same_payload_and_scales_within_one_step(tmp_path: Path, depths: int) -> None:
    make_deepseek_like(tmp_path / "theirs", depths)
    model = load(tmp_path / "theirs", dtype=torch.float32)
    assert not model.config.fp8
    save(model, tmp_path / "ours", fp8=True)
    payloads, scales = payloads_and_scales(tmp_path / "theirs")
    ours, our_scales = payloads_and_scales(tmp_path / "ours")
    assert ours == payloads
    for name, scale in scales.items():
        assert (scale.view(torch.int32) - our_scales[name].view(torch.int32)).abs().max() <= 1, name
    save(load(tmp_path / "ours"), tmp_path / "again", fp8=True)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "ours")


@DEPTHS
def test_fp8_through_bfloat16_keeps_the_payload_and_then_stays(tmp_path: Path, depths: int) -> None:
    make_deepseek_like(tmp_path / "theirs", depths)
    save(load(tmp_path / "theirs", dtype=torch.bfloat16), tmp_path / "ours", fp8=True)
    payloads, scales = payloads_and_scales(tmp_path / "theirs")
    ours, our_scales = payloads_and_scales(tmp_path / "ours")
    assert ours == payloads
    for name, scale in scales.items():
        assert (our_scales[name] / scale - 1).abs().max() <= 1 / 256 + 1e-6, name
    save(load(tmp_path / "ours", dtype=torch.bfloat16), tmp_path / "again", fp8=True)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "ours")


@DEPTHS
def test_quantised_once_is_idempotent_from_then_on(tmp_path: Path, depths: int) -> None:
    save(build(replace(RAGGED, num_nextn_predict_layers=depths)), tmp_path / "first", fp8=True)
    save(load(tmp_path / "first"), tmp_path / "second", fp8=True)
    assert file_bytes(tmp_path / "first") == file_bytes(tmp_path / "second")


def test_fp8_config_may_keep_some_projections_unquantised(tmp_path: Path) -> None:
    save(build(RAGGED), tmp_path, fp8=True)
    name = "model.layers.0.self_attn.o_proj.weight"

    def keep_plain(tensors: dict[str, Tensor]) -> None:
        tensors[name] = dequantize_128x128(tensors[name], tensors.pop(name + "_scale_inv"))

    before = load(tmp_path)
    rewrite_tensors(tmp_path, keep_plain)
    assert_equal_weights(load(tmp_path), before)


def test_values_that_fp8_cannot_hold_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    model = build(BASE)
    dict(hf_tensors(model))[EXPERT][0, 0] = math.inf
    with pytest.raises(InputError, match=f"{EXPERT} holds inf or nan"):
        save(model, tmp_path / "out", fp8=True)
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "out")  # without FP8 it can be saved and looked into
    assert_equal_weights(load(tmp_path / "out"), model)


# transformers


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in CONFIGS), ("v3-mtp", torch.bfloat16), ("v2", torch.bfloat16)],
)
def test_transformers_loads_our_directories(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(CONFIGS[kind], dtype)
    save(model, tmp_path)
    oracle, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith(("model.layers.3.", "model.layers.4.")) for name in report["unexpected_keys"])  # MTP
    ours = load(tmp_path)(token_ids(model.config))
    with torch.no_grad():
        theirs = oracle(token_ids(model.config)).logits
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("v3", torch.float32),
        ("v3", torch.bfloat16),  # the router bias too is bfloat16 there
        ("v3-no-query-rank", torch.float32),
        ("v2", torch.bfloat16),
        ("v2-lite", torch.float32),
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("llama-tied", torch.float32),
        ("llama-biases", torch.float32),
        ("qwen2", torch.float32),
        ("qwen2-tied", torch.bfloat16),
        ("qwen3", torch.float32),
        ("qwen3-tied", torch.float32),
    ],
)
def test_we_load_what_transformers_saves(kind: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    data = CONFIGS[kind].to_dict()
    data.pop("num_nextn_predict_layers", None)  # as transformers does by default, announce a layer that is not stored
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(data.pop("model_type"), **data), dtype=dtype)
    with torch.no_grad():
        for name, buffer in oracle.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.01)
        for name, parameter in oracle.named_parameters():
            if name.endswith(".bias") or "_norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    model = load(tmp_path)
    announced = [record.getMessage() for record in caplog.records if record.name == "finback"]
    assert [message.endswith("loaded without MTP") for message in announced] == [True] * kind.startswith("v3")
    assert model.config.num_nextn_predict_layers == 0
    ours = model(token_ids(model.config))
    with torch.no_grad():
        theirs = oracle.float()(token_ids(model.config)).logits
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)


# MTP layers


@pytest.fixture
def with_mtp(tmp_path: Path) -> Path:
    save(build(CONFIGS["v3-mtp"]), tmp_path)
    return tmp_path


def test_mtp_layers_store_their_own_copies(with_mtp: Path) -> None:
    tensors = stored_tensors(with_mtp)
    for layer in (3, 4):
        copy = tensors[f"model.layers.{layer}.embed_tokens.weight"]
        assert raw_bytes(copy) == raw_bytes(tensors["model.embed_tokens.weight"])
        copy = tensors[f"model.layers.{layer}.shared_head.head.weight"]
        assert raw_bytes(copy) == raw_bytes(tensors["lm_head.weight"])


def test_mtp_copies_may_be_absent(with_mtp: Path) -> None:
    before = load(with_mtp)
    rewrite_tensors(with_mtp, drop("model.layers.3.embed_tokens.weight"))
    rewrite_tensors(with_mtp, drop("model.layers.4.shared_head.head.weight"))
    assert_equal_weights(load(with_mtp), before)


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.4.shared_head.head.weight"])
def test_mtp_copy_that_differs_by_one_bit_is_told(name: str, with_mtp: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int32)[-1, -1] ^= 1

    rewrite_tensors(with_mtp, change)
    with pytest.raises(InputError, match=rf"{name} that differs from (model\.embed_tokens|lm_head)\.weight"):
        load(with_mtp)


def test_mtp_that_is_announced_but_not_stored_is_left_out(with_mtp: Path, caplog: pytest.LogCaptureFixture) -> None:
    def drop_all(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(("model.layers.3.", "model.layers.4."))]:
            del tensors[name]

    rewrite_tensors(with_mtp, drop_all)
    model = load(with_mtp)
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == 3
    (record,) = [record for record in caplog.records if record.name == "finback"]
    assert "num_nextn_predict_layers 2, but no MTP layer is stored; loaded without MTP" in record.getMessage()


def test_mtp_layer_that_is_half_stored_is_told(with_mtp: Path) -> None:
    rewrite_tensors(with_mtp, drop("model.layers.4.eh_proj.weight"))
    with pytest.raises(InputError, match=r"lacks tensor model\.layers\.4\.eh_proj\.weight"):
        load(with_mtp)


def test_mtp_layer_that_is_not_announced_is_told(with_mtp: Path) -> None:
    rewrite_config(with_mtp, num_nextn_predict_layers=1)
    with pytest.raises(InputError, match=r"model\.layers\.4\..* num_nextn_predict_layers 1"):
        load(with_mtp)


# Bad directories


Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(EXPERT), rf"lacks tensor {EXPERT}; fetch"),
        (drop("lm_head.weight"), r"lacks tensor lm_head\.weight"),
        (rename(EXPERT, EXPERT.replace("up", "upp")), rf"lacks tensor {EXPERT}; did you mean '.*upp_proj\.weight'"),
        (put("model.layers.0.mlp.gate.weight", torch.ones(2)), r"holds model\.layers\.0\.mlp\.gate\.weight, unknown"),
        (put("model.layers.7.enorm.weight", torch.ones(2)), r"layers\.7\.enorm\.weight.*num_hidden_layers is 3"),
        (put(EXPERT, torch.ones(24, 41)), rf"{EXPERT} of shape \[24, 41\], config\.json gives \[24, 40\]"),
        (put(EXPERT, torch.ones(960)), rf"{EXPERT} of shape \[960\], config\.json gives \[24, 40\]"),
        (put(EXPERT, torch.ones(24, 40, dtype=torch.int8)), rf"{EXPERT} as I8, supported for it are F32, .*, F8_E4M3"),
        (put(EXPERT, torch.ones(24, 40, dtype=torch.float64)), rf"{EXPERT} as F64"),
        (put(EXPERT, torch.ones(24, 40).to(torch.float8_e5m2)), rf"{EXPERT} as F8_E5M2"),
        (put("model.norm.weight", torch.ones(40).to(torch.float8_e4m3fn)), r"model\.norm\.weight as F8_E4M3, supported"),
        (put(EXPERT, torch.ones(24, 40).to(torch.float8_e4m3fn)), "in FP8, but config.json has no quantization_config"),
        (put(Q_A + "_scale_inv", torch.ones(1, 1)), r"q_a_proj\.weight as F32, but .* has FP8 scales for it"),
    ],
)
def test_wrong_tensor_is_told_by_name(change: Change, words: str, tmp_path: Path) -> None:
    save(build(BASE), tmp_path)
    rewrite_tensors(tmp_path, change)
    with pytest.raises(InputError, match=words) as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(Q_A + "_scale_inv"), rf"{Q_A} in FP8, but its scales {Q_A}_scale_inv are nowhere"),
        (drop(Q_A), rf"lacks tensor {Q_A}"),
        (put(Q_A + "_scale_inv", torch.ones(2, 1)), r"_scale_inv as F32 \[2, 1\], its weight needs F32 \[1, 1\]"),
        (put(Q_A + "_scale_inv", torch.ones(1, 1).half()), r"_scale_inv as F16 \[1, 1\], its weight needs F32"),
        (put(Q_A + "_scale_inv", torch.tensor([[math.nan]])), rf"holds inf or nan in {Q_A}_scale_inv"),
        (put(Q_A + "_scale_inv", torch.tensor([[math.inf]])), rf"holds inf or nan in {Q_A}_scale_inv"),
    ],
)
def test_half_of_an_fp8_pair_is_told_by_name(change: Change, words: str, tmp_path: Path) -> None:
    save(build(BASE), tmp_path, fp8=True)
    rewrite_tensors(tmp_path, change)
    with pytest.raises(InputError, match=words):
        load(tmp_path)


def test_config_that_does_not_fit_the_tensors_is_told(tmp_path: Path) -> None:
    save(build(BASE), tmp_path)
    rewrite_config(tmp_path, vocab_size=97)
    with pytest.raises(InputError, match=r"embed_tokens\.weight of shape \[96, 40\], config\.json gives \[97, 40\]"):
        load(tmp_path)
    rewrite_config(tmp_path, vocab_size=96, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lacks tensor model\.layers\.3\.input_layernorm\.weight"):
        load(tmp_path)


def test_damaged_files_are_told_by_name(tmp_path: Path) -> None:
    save(build(BASE), tmp_path, max_shard_bytes=50_000)
    shard = sorted(tmp_path.glob("model-00002-of-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{shard.name} is truncated inside model\.layers"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name} is missing"):
        load(tmp_path)
    shard.write_bytes(content)
    load(tmp_path)
    with pytest.raises(InputError, match=r"dtype is torch\.float64"):
        load(tmp_path, dtype=torch.float64)


# Saving


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(build(BASE), source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    save(load(source), tmp_path / "loaded")
    save(build(BASE), tmp_path / "given", tokenizer_from=source)
    for out in (tmp_path / "loaded", tmp_path / "given"):
        assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
        assert (out / "tokenizer.json").read_text() == "tokenizer.json"
        assert (out / "generation_config.json").read_text() == '{"temperature": 0.6}'
        assert not (out / "README.md").exists()
    with pytest.raises(InputError, match="nowhere is not a directory"):
        save(build(BASE), tmp_path / "out", tokenizer_from=tmp_path / "nowhere")
    model = load(source)
    source.rename(tmp_path / "elsewhere")
    save(model, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_saving_over_a_checkpoint_replaces_its_files_and_keeps_others(tmp_path: Path) -> None:
    save(build(BASE), tmp_path, max_shard_bytes=50_000)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "chat_template.jinja").write_text("old")
    save(build(BASE, seed=1), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    expected = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    assert names == expected
    assert_equal_weights(load(tmp_path), build(BASE, seed=1))
    tokenizer = tmp_path.with_name("tokenizer")
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    save(build(BASE), tmp_path, tokenizer_from=tokenizer)
    assert not (tmp_path / "chat_template.jinja").exists()  # it belonged to another tokenizer


def test_model_that_cannot_be_saved_is_told_and_leaves_the_old_one(tmp_path: Path) -> None:
    save(build(BASE), tmp_path / "model")
    before = file_bytes(tmp_path / "model")
    mixed = build(BASE)
    mixed.lm_head.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"parameters are torch\.bfloat16, torch\.float32; a checkpoint has one"):
        save(mixed, tmp_path / "model")
    with pytest.raises(InputError, match=r"parameters are torch\.float64"):
        save(build(CONFIGS["v2"]).double(), tmp_path / "model")
    with pytest.raises(InputError, match="max_shard_bytes is 0"):
        save(build(BASE), tmp_path / "model", max_shard_bytes=0)
    assert file_bytes(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_being_written_is_no_checkpoint_yet(tmp_path: Path) -> None:
    model, seen = build(BASE), []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for pair in hf_tensors(model):
            (hidden,) = tmp_path.iterdir()
            seen.append(hidden.name.startswith(".model.") and not (hidden / "config.json").exists())
            yield pair

    write_checkpoint(tmp_path / "model", model.config, watched())
    assert len(seen) > 10
    assert all(seen)
    assert_equal_weights(load(tmp_path / "model"), model)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.checkpoint_samples import BASE, build
from finback.model.checkpoint import save

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    save(build(BASE, seed=1), Path(sys.argv[1]))
except OSError as error:
    print("told", error.errno is not None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("limit", [100, 70_000])  # inside the header, inside the weights
def test_disk_that_fills_up_leaves_the_old_checkpoint(limit: int, tmp_path: Path) -> None:
    save(build(BASE), tmp_path / "model")
    before = file_bytes(tmp_path / "model")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "model"), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == "told True\n"
    assert file_bytes(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Memory

MEMORY = """
import sys
from pathlib import Path
import torch
from finback.config import checkpoint_tensors
from finback.model.checkpoint import hf_tensors, load, save, write_checkpoint
from finback.model.safetensors_io import tensor_bytes
from finback.model.transformer import Transformer
from tests.checkpoint_samples import BASE, build
from dataclasses import replace

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def peak_of(work):
    "Most memory that `work` held beyond what the process had, in bytes."
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    result = work()
    return memory("VmHWM") - before, result

directory = Path(sys.argv[1])
for dtype, fp8 in ((torch.float32, False), (torch.bfloat16, True)):  # first use of everything
    save(build(BASE, dtype), directory / "small", fp8=fp8)
    load(directory / "small")
config = replace(BASE, vocab_size=8192, hidden_size=1024, moe_intermediate_size=512, num_nextn_predict_layers=1, n_routed_experts=16)
model = Transformer(config, dtype=torch.bfloat16)
for name, tensor in hf_tensors(model):
    tensor.fill_(0.01)
pair = max(tensor_bytes(spec) for spec in checkpoint_tensors(replace(config, torch_dtype="bfloat16")))
for name, fp8 in (("plain", False), ("fp8", True)):
    peak, _ = peak_of(lambda: save(model, directory / name, fp8=fp8))
    print("save", name, peak, 0, pair)
del model
for name in ("plain", "fp8"):
    for dtype in (torch.bfloat16, torch.float32):
        peak, model = peak_of(lambda: load(directory / name, dtype=dtype))
        print("load", name, peak, sum(t.nbytes for t in model.state_dict().values()), pair)
        del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting of memory")
def test_peak_memory_is_the_model_plus_one_tensor(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 6
    slack = 24e6  # scratch of the casts, freed blocks that the allocator keeps
    for what, name, peak, model, pair in lines:
        assert int(peak) <= int(model) + int(pair) + slack, (what, name, result.stdout)
    assert max(int(model) for *_, model, _ in lines) > 250e6, "large enough that a second copy would show"
