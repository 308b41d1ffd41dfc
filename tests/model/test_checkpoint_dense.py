"""What only directories of dense students have: tied heads that are stored or not, biases, old rotary tables; FP8 as well."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finback.config import InputError, ModelConfig
from finback.model.checkpoint import converted, hf_tensors, load, open_checkpoint, save, write_checkpoint
from finback.model.safetensors_io import read_catalog
from tests.checkpoint_samples import CONFIGS, LLAMA, build, rewrite_config, rewrite_tensors, token_ids

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(kind: str, directory: Path) -> Path:
    save(build(CONFIGS[kind]), directory)
    return directory


def test_a_tied_head_is_stored_once_and_loaded_as_one(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path)
    stored = read_catalog(tmp_path)
    assert EMBEDDING in stored
    assert HEAD not in stored
    model = load(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    """Some publishers store it; transformers ties it all the same, so another one would be lost without a word."""
    saved("qwen3-tied", tmp_path)
    expected = load(tmp_path)(token_ids(LLAMA))
    rewrite_tensors(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert torch.equal(load(tmp_path)(token_ids(LLAMA)), expected)
    save(load(tmp_path), tmp_path / "again")
    assert HEAD not in read_catalog(tmp_path / "again")
    rewrite_tensors(tmp_path, lambda tensors: tensors[HEAD].mul_(2))
    with pytest.raises(InputError, match=f"{HEAD} that differs from {EMBEDDING}, but tie_word_embeddings"):
        load(tmp_path)
    source = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=f"{HEAD} that differs from {EMBEDDING}"):
        list(converted(source, source.config))


def test_a_head_of_another_shape_is_told(tmp_path: Path) -> None:
    saved("llama-tied", tmp_path)
    rewrite_tensors(tmp_path, lambda tensors: tensors.update({HEAD: torch.zeros(3, 40)}))
    with pytest.raises(InputError, match=rf"{HEAD} of shape \[3, 40\], config.json gives \[96, 40\]"):
        load(tmp_path)


def test_rotary_tables_of_old_llama_files_are_left_out(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    expected = load(tmp_path)(token_ids(LLAMA))
    table = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    rewrite_tensors(tmp_path, lambda tensors: tensors.update({table.format(layer): torch.ones(5) for layer in range(3)}))
    assert torch.equal(load(tmp_path)(token_ids(LLAMA)), expected)
    source = open_checkpoint(tmp_path)
    write_checkpoint(tmp_path / "out", source.config, converted(source, source.config))
    assert not any("inv_freq" in name for name in read_catalog(tmp_path / "out"))


LAYER = "model.layers.1.self_attn."


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("qwen2", lambda t: t.pop(LAYER + "k_proj.bias"), rf"lacks tensor {LAYER}k_proj\.bias"),
        ("qwen3", lambda t: t.pop(LAYER + "q_norm.weight"), rf"lacks tensor {LAYER}q_norm\.weight"),
        ("llama", lambda t: t.pop(HEAD), rf"lacks tensor {HEAD}"),
        ("llama", lambda t: t.update({LAYER + "q_proj.bias": torch.zeros(40)}), r"q_proj\.bias, unknown to config\.json"),
        ("qwen2", lambda t: t.update({LAYER + "o_proj.bias": torch.zeros(40)}), r"o_proj\.bias, unknown to config\.json"),
        ("llama", lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(72)}), r"a llama model has no such tensor"),
        ("qwen3", lambda t: t.update({LAYER + "k_norm.weight": torch.zeros(10)}), r"of shape \[10\], config\.json gives \[12\]"),
        ("llama", lambda t: t.update({LAYER + "k_proj.weight": torch.zeros(40, 40)}), r"config\.json gives \[20, 40\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_told(
    kind: str, change: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    rewrite_tensors(tmp_path, change)
    with pytest.raises(InputError, match=words):
        load(tmp_path)


def test_fp8_keeps_biases_norms_and_ends_in_the_models_dtype(tmp_path: Path) -> None:
    config = replace(LLAMA, hidden_size=200, head_dim=50, intermediate_size=300, attention_bias=True, tie_word_embeddings=True)
    model = build(config, torch.bfloat16)
    save(model, tmp_path, fp8=True)
    stored = read_catalog(tmp_path)
    for name, entry in stored.items():
        if not name.endswith("_scale_inv"):
            assert entry.dtype == ("F8_E4M3" if name.endswith("_proj.weight") else "BF16"), name
    expected = dict(hf_tensors(model))
    for name, weight in hf_tensors(load(tmp_path)):
        error = torch.linalg.vector_norm(weight - expected[name].float()) / torch.linalg.vector_norm(expected[name].float())
        assert 0 < error < 2**-4 if name.endswith("_proj.weight") else error == 0, name
    assert ModelConfig.from_hf(tmp_path).fp8


def test_config_and_weights_of_different_families_are_told(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    rewrite_config(tmp_path, model_type="qwen2", architectures=None, attention_bias=None, mlp_bias=None, rope_scaling=None)
    with pytest.raises(InputError, match=r"lacks tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(tmp_path)
