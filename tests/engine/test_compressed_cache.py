"""The engine over a compressed cache: as the model computes over rows that went through the codes, and shared like plain ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.runner import Backend
from finback.ops.compressed import CodeFormat, CompressedRows, compressed_rows
from tests.engine.models import CONFIGS
from tests.engine.test_llm import engine, random_prompts
from tests.model.oracle import build

FORMATS: list[CodeFormat] = ["int8", "fp8"]
BACKENDS: list[Backend] = ["torch", "native"]
NOISE = 0.03  # between two logits: a value that lies between two codes takes the one or the other
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["v3", "v2-lite", "llama", "qwen3"])
def test_answers_stay_close_to_those_of_plain_rows(name: str, format: CodeFormat, backend: Backend) -> None:
    """Log-probabilities of the first token, whose rows are all computed from the same prompt, and prefix hits that change nothing."""
    model = build(CONFIGS[name])
    prompts = random_prompts(model.config.vocab_size)
    plain, compressed = engine(model, backend="torch"), engine(model, kv_cache_dtype=format, backend=backend)
    assert compressed._runner.backend == backend
    expected, answers = plain.generate(prompts, GREEDY), compressed.generate(prompts, GREEDY)
    for mine, other in zip(answers, expected, strict=True):
        assert mine.logprobs is not None
        assert other.logprobs is not None
        if mine.token_ids[0] == other.token_ids[0]:
            assert mine.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.05)
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(answers, expected, strict=True)) >= len(prompts) - 1
    again = compressed.generate(prompts, GREEDY)
    assert any(output.num_cached_tokens for output in again)
    assert [a.token_ids for a in again] == [a.token_ids for a in answers]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["v3", "v3-yarn", "v2-lite", "llama-biases", "qwen3"])
def test_backends_write_the_same_bytes_and_tokens(name: str, format: CodeFormat) -> None:
    """Greedy answers over chunks and blocks. Values that sums in another order put across a border differ by one code, and those are
    few; tokens may part where two logits are as close as that."""
    model = build(CONFIGS[name])
    layout = compressed_rows(model.config, format)
    prompts = random_prompts(model.config.vocab_size)
    llms = [engine(model, kv_cache_dtype=format, backend=backend) for backend in BACKENDS]
    answers = [llm.generate(prompts, GREEDY) for llm in llms]
    for prompt, torches, natives in zip(prompts, *answers, strict=True):
        mine, other = natives.token_ids, torches.token_ids
        at = next((i for i in range(len(mine)) if mine[i] != other[i]), None)
        if at is not None:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *mine[:at]]]))[0, -1]
            assert float((logits[mine[at]] - logits[other[at]]).abs()) < NOISE, f"token {at}: {mine} {other}"
    for llm in llms:
        llm.reset_prefix_cache()
        llm._runner.cache.zero_()
        llm.generate(max(prompts, key=len), replace(GREEDY, max_tokens=1))
    codes, scales = zip(*(_parts(llm._runner.cache, layout) for llm in llms), strict=True)
    apart, written = (codes[0] != codes[1]), codes[0] != 0
    assert written.sum() > 1000
    assert apart[0].sum() < 0.002 * written[0].sum()
    assert apart.sum() < 0.02 * written.sum()  # one code of the first layer moves all values of those behind it
    torch.testing.assert_close(*scales, rtol=2e-2 if format == "fp8" else 5e-3, atol=1e-7)


def _parts(cache: Tensor, layout: CompressedRows) -> tuple[Tensor, Tensor]:
    """Codes as integers, and scales."""
    scales = cache[..., layout.coded : layout.coded + 4 * (layout.coded // layout.tile)]
    return cache[..., : layout.coded].view(torch.int8), scales.clone().view(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_mtp_module_drafts_over_compressed_rows(format: CodeFormat, backend: Backend) -> None:
    model = build(CONFIGS["v3-mtp"])
    prompts = random_prompts(model.config.vocab_size)
    llm = engine(model, kv_cache_dtype=format, num_speculative_tokens=2, backend=backend)
    assert all(len(output.token_ids) == 12 for output in llm.generate(prompts, GREEDY))
    assert llm.stats.drafted_tokens > 0


def test_a_prefix_cache_in_a_file_belongs_to_its_format(tmp_path: Path) -> None:
    model = build(CONFIGS["v3"])
    llm: LLM = engine(model, kv_cache_dtype="int8")
    llm.generate(random_prompts(model.config.vocab_size), GREEDY)
    count = llm.save_prefix_cache(tmp_path / "rows")
    assert count > 0
    assert engine(model, kv_cache_dtype="fp8").load_prefix_cache(tmp_path / "rows") == 0
    assert engine(model, kv_cache_dtype="int8").load_prefix_cache(tmp_path / "rows") == count


def test_the_cache_is_as_large_as_it_says() -> None:
    model = build(CONFIGS["v3"]).to(torch.bfloat16)
    plain, compressed = engine(model), engine(model, kv_cache_dtype="int8")
    c = model.config
    assert plain.cache_bytes_per_token == 2 * c.cache_row_width
    assert compressed.cache_bytes_per_token == c.kv_lora_rank + 4 + 2 * c.qk_rope_head_dim
    assert compressed._runner.cache.nbytes == 64 * 4 * c.num_hidden_layers * compressed.cache_bytes_per_token
