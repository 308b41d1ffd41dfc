"""Quantised directories in the engine: weights stay packed where the native kernels run, and the text is that of dequantised ones."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finback import cli
from finback.config import InputError, ModelConfig
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import hf_tensors, load, save
from finback.model.layers import Linear
from finback.model.moe import Experts
from finback.ops.packed import unpacked
from tests.checkpoint_samples import build
from tests.engine.models import QWEN2, V3_MTP, assert_same_tokens
from tests.ops.native.rule import compiled

DENSE = replace(
    QWEN2,
    hidden_size=64,
    intermediate_size=96,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
MOE = replace(
    V3_MTP, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=32, v_head_dim=16, num_attention_heads=4
)
PROMPTS = [[3, 14, 15, 92, 65], [35, 8, 9, 7, 9, 3, 23, 84], [6]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def quantised(directory: Path, config: ModelConfig, *options: str) -> Path:
    """A random model of `config`, rounded to nearest in groups of 32."""
    compiled()  # or skipped
    save(build(config), directory / "plain")
    words = [str(directory / "plain"), str(directory / "packed"), "--method", "rtn", "--group-size", "32", *options]
    assert cli.main(["quantize", *words]) == 0
    return directory / "packed"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(tmp_path_factory.mktemp("dense"), DENSE)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised(tmp_path_factory.mktemp("moe"), MOE, "--no-sym")


@pytest.fixture(params=["dense", "moe"])
def directory(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_greedy_text_is_that_of_the_dequantised_model(directory: Path) -> None:
    llm = LLM(directory, dtype=torch.float32)
    plain = load(directory)
    assert llm.model.is_packed
    assert llm.model.weight_bytes < plain.weight_bytes
    outputs, expected = (engine.generate(PROMPTS, GREEDY) for engine in (llm, LLM(model=plain)))
    for prompt, output, other in zip(PROMPTS, outputs, expected, strict=True):
        assert_same_tokens(plain, prompt, output.token_ids, other.token_ids)


def test_eight_bits(tmp_path: Path) -> None:
    test_greedy_text_is_that_of_the_dequantised_model(quantised(tmp_path, DENSE, "--bits", "8"))


def test_drafts_by_packed_weights_change_no_token(moe: Path) -> None:
    with_drafts, without = (LLM(moe, dtype=torch.float32, num_speculative_tokens=n).generate(PROMPTS, GREEDY) for n in (2, 0))
    for prompt, output, other in zip(PROMPTS, with_drafts, without, strict=True):
        assert_same_tokens(load(moe), prompt, output.token_ids, other.token_ids)


def test_whole_sequences_in_torch_are_those_of_the_dequantised_model(directory: Path) -> None:
    packed, plain = load(directory, packed=True), load(directory)
    for path, module in packed.named_modules():
        other = plain.get_submodule(path)
        if isinstance(module, Linear) and module.packed is not None:
            assert torch.equal(unpacked(module.packed), other.weight)  # type: ignore[arg-type]
        elif isinstance(module, Experts):
            assert module.packed is not None
            for weight, name in zip(module.packed, ("gate_proj", "up_proj", "down_proj"), strict=True):
                assert torch.equal(unpacked(weight), getattr(other, name))
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), plain(ids))


def test_what_cannot_stay_packed_is_dequantised_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = quantised(tmp_path, replace(DENSE, intermediate_size=128), "--bits", "3")
    with caplog.at_level(logging.INFO, logger="finback"):
        llm = LLM(directory, dtype=torch.float32)
    assert not llm.model.is_packed
    assert [record for record in caplog.records if "quantised weights are dequantised" in record.message][1:] == []
    assert "21 of 21 quantised weights are dequantised" in caplog.text
    outputs, expected = (engine.generate(PROMPTS[:1], GREEDY) for engine in (llm, LLM(model=load(directory))))
    assert outputs[0].token_ids == expected[0].token_ids


def test_a_feed_forward_that_is_quantised_in_part_is_dequantised(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As GPTQModel leaves it where `dynamic` excludes a projection."""
    plain, directory = load(dense), tmp_path / "part"
    shutil.copytree(dense, directory)
    file = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".down_proj." not in name}
    tensors |= {name: tensor for name, tensor in hf_tensors(plain) if ".down_proj." in name}
    save_file(tensors, file)
    with caplog.at_level(logging.INFO, logger="finback"):
        llm = LLM(directory, dtype=torch.float32)
    assert llm.model.is_packed
    assert "6 of 18 quantised weights are dequantised" in caplog.text
    outputs, expected = (engine.generate(PROMPTS, GREEDY) for engine in (llm, LLM(model=plain)))
    for prompt, output, other in zip(PROMPTS, outputs, expected, strict=True):
        assert_same_tokens(plain, prompt, output.token_ids, other.token_ids)


def test_a_packed_model_is_for_inference_only(dense: Path, tmp_path: Path) -> None:
    packed = load(dense, packed=True)
    with pytest.raises(InputError, match="packed, for inference only"):
        list(hf_tensors(packed))
    with pytest.raises(InputError, match="packed, for inference only"):
        save(packed, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not LLM(dense, backend="torch").model.is_packed
    assert not load(dense).is_packed


@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_in_few_bits_is_its_nearest_grid(bits: int, tmp_path: Path) -> None:
    compiled()
    model = build(DENSE)
    save(model, tmp_path)
    llm = LLM(tmp_path, dtype=torch.float32, head_bits=bits)
    assert llm.model.lm_head.packed is not None
    with torch.no_grad():
        model.lm_head.weight.data = unpacked(llm.model.lm_head.packed)  # of the head alone: the embedding keeps its own
        model.config = replace(model.config, tie_word_embeddings=False)
        model.model.embed_tokens.weight = torch.nn.Parameter(load(tmp_path).model.embed_tokens.weight.detach())  # type: ignore[assignment]
    plain = LLM(model=model)
    for prompt, output, other in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), plain.generate(PROMPTS, GREEDY), strict=True):
        assert_same_tokens(model, prompt, output.token_ids, other.token_ids)


def test_a_head_that_cannot_be_rounded_is_one_sentence(tmp_path: Path) -> None:
    model = build(DENSE)
    save(model, tmp_path)
    with pytest.raises(InputError, match="head_bits is 3, it must be 8, 4, or None"):
        LLM(tmp_path, head_bits=3)
    with pytest.raises(InputError, match="head_bits is 8, but the weights are those of model="):
        LLM(model=model, head_bits=8)
    with pytest.raises(InputError, match="head_bits is 8, but only the native kernels"):
        LLM(tmp_path, head_bits=8, backend="torch")
