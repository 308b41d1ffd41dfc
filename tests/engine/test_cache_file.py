"""The prefix cache in a file: the same hits and the same answers after a restart, and none of another model's."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finback.config import InputError, ModelConfig
from finback.engine.cache_file import model_identity
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import load
from finback.model.transformer import Transformer, init_weights
from tests.engine.models import CONFIGS
from tests.engine.test_packed_weights import DENSE, MOE, quantised

PARAMS = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = [[(7 * i + j) % 90 + 1 for i in range(40 + 9 * j)] for j in range(4)]


def small(name: str, seed: int = 0) -> Transformer:
    model = Transformer(CONFIGS[name], dtype=torch.float32)
    init_weights(model, seed)
    return model


def engine(model: Transformer, num_blocks: int = 64, **options: int) -> LLM:
    return LLM(model=model, max_num_seqs=4, block_size=8, num_blocks=num_blocks, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "drafts"), [("v3", 0), ("v3-mtp", 1), ("llama", 0)])
def test_prefixes_are_found_again_after_a_restart(name: str, drafts: int, tmp_path: Path) -> None:
    file, first = tmp_path / "cache.safetensors", engine(small(name), num_speculative_tokens=drafts)
    before = first.generate(PROMPTS, PARAMS)
    assert first.save_prefix_cache(file) > 0
    again = first.generate(PROMPTS, PARAMS)
    second = engine(small(name), num_speculative_tokens=drafts)
    assert second.load_prefix_cache(file) > 0
    after = second.generate(PROMPTS, PARAMS)
    assert [one.num_cached_tokens for one in after] == [one.num_cached_tokens for one in again]
    assert all(one.num_cached_tokens > 0 for one in after)
    assert [one.token_ids for one in after] == [one.token_ids for one in before]
    assert second.num_free_blocks == second.num_blocks


def test_a_smaller_cache_keeps_whole_prefixes(tmp_path: Path) -> None:
    file, model = tmp_path / "cache.safetensors", small("v3")
    first = engine(model)
    expected = first.generate(PROMPTS, PARAMS)
    total = first.save_prefix_cache(file)
    second = engine(model, num_blocks=total - 5)
    assert second.load_prefix_cache(file) == total - 5
    assert [one.token_ids for one in second.generate(PROMPTS, PARAMS)] == [one.token_ids for one in expected]


def test_another_models_prefixes_are_not_used(tmp_path: Path) -> None:
    file, first = tmp_path / "cache.safetensors", engine(small("v3"))
    first.generate(PROMPTS, PARAMS)
    first.save_prefix_cache(file)
    assert engine(small("v3", seed=1)).load_prefix_cache(file) == 0
    assert LLM(model=small("v3"), block_size=16, num_blocks=32).load_prefix_cache(file) == 0


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_packed_weights_belong_to_the_identity(config: ModelConfig, tmp_path: Path) -> None:
    """A directory finds its own prefixes again. One that differs in packed weights alone has others, and so has one of 8 bits."""

    def packed(directory: Path, **options: int) -> LLM:
        return LLM(directory, dtype=torch.float32, block_size=8, num_blocks=64, **options)  # type: ignore[arg-type]

    directory, file = quantised(tmp_path / "one", config), tmp_path / "cache.safetensors"
    first = packed(directory)
    assert first.model.is_packed
    first.generate(PROMPTS, PARAMS)
    kept = first.save_prefix_cache(file)
    assert kept > 0
    assert packed(directory, head_bits=8).load_prefix_cache(file) == kept
    weights, other = (tmp_path / name / "packed" / "model.safetensors" for name in ("one", "two"))
    other.parent.mkdir(parents=True)
    shutil.copytree(directory, other.parent, dirs_exist_ok=True)
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith(("mlp.gate_proj.qweight", "experts.1.up_proj.qweight")))
    tensors[name][0, 0] ^= 1
    save_file(tensors, other)
    assert packed(other.parent).load_prefix_cache(file) == 0
    assert model_identity(load(quantised(tmp_path / "three", config, "--bits", "8"), packed=True)) != model_identity(first.model)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    file.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(InputError, match="remove it"):
        engine(small("v3")).load_prefix_cache(file)
    empty = engine(small("v3"))
    assert empty.save_prefix_cache(file) == 0
    assert empty.load_prefix_cache(file) == 0
