"""The engine whole: the same tokens as transformers whatever happens on the way, and every block free at the end."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finback.config import InputError
from finback.data.tokenizer import Tokenizer, save_tokenizer, train_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.grammar_config import Grammar
from finback.engine.llm import LLM
from finback.engine.runner import Backend
from finback.model.checkpoint import save
from finback.model.transformer import Transformer
from tests.engine.models import CONFIGS, V3_MTP, assert_same_tokens, transformers_greedy
from tests.model.oracle import build

BACKENDS: list[Backend] = ["torch", "native"]
LENGTHS = (3, 1, 17, 40, 9, 26)
ANSWER = 12


def engine(model: Transformer, **fields: Any) -> LLM:
    """Small blocks and a small token budget, so that paging and chunks happen."""
    settings = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 64} | fields
    return LLM(model=model, **settings)


def random_prompts(vocab: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab) for _ in range(length)] for length in lengths]


def all_free(llm: LLM) -> bool:
    return llm.num_free_blocks == llm.num_blocks and not llm.has_unfinished


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_those_of_transformers(name: str, backend: Backend) -> None:
    """Mixed lengths through paging, chunked prefill, and a second time through prefix hits."""
    model = build(CONFIGS[name])
    prompts = random_prompts(model.config.vocab_size)
    expected = transformers_greedy(model, prompts, ANSWER)
    llm = engine(model, backend=backend)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    for turn in range(2):
        outputs = llm.generate(prompts, params)
        for prompt, output, tokens in zip(prompts, outputs, expected, strict=True):
            assert_same_tokens(model, prompt, output.token_ids, tokens)
            assert output.finish_reason == "length"
            assert output.num_cached_tokens == (0 if turn == 0 else (len(prompt) - 1) // 4 * 4)
    assert all_free(llm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafts", [1, 3])
def test_speculation_changes_no_greedy_token(backend: Backend, drafts: int) -> None:
    model = build(V3_MTP)
    prompts = random_prompts(model.config.vocab_size)
    expected = transformers_greedy(model, prompts, ANSWER)
    llm = engine(model, backend=backend, num_speculative_tokens=drafts)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    for _ in range(2):
        for prompt, output, tokens in zip(prompts, llm.generate(prompts, params), expected, strict=True):
            assert_same_tokens(model, prompt, output.token_ids, tokens)
    assert llm.stats.drafted_tokens > 0
    assert all_free(llm)


def test_a_perfect_draft_is_accepted() -> None:
    """A model that always repeats its input's successor: the MTP module, made to agree, is accepted nearly always."""
    model = predictable(V3_MTP.vocab_size)
    llm = engine(model, num_speculative_tokens=1)
    output = llm.generate([5], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0]
    assert output.token_ids == [(6 + i) % V3_MTP.vocab_size for i in range(40)]
    assert llm.stats.acceptance_rate is not None
    assert llm.stats.acceptance_rate > 0.9
    assert llm.stats.steps < 25


def predictable(vocab: int) -> Transformer:
    """Token i is followed by i + 1, and the MTP module knows it too: blocks add nothing, embeddings are random directions."""
    model = build(replace(V3_MTP, vocab_size=vocab))
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(vocab, model.config.hidden_size, generator=generator), dim=-1)
    with torch.no_grad():
        for block in [*model.blocks, *model.mtp_modules]:
            block.self_attn.o_proj.weight.zero_()
            mlp: Any = block.mlp
            if hasattr(mlp, "experts"):
                mlp.experts.down_proj.zero_()
                mlp.shared_experts.down_proj.weight.zero_()
            else:
                mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.copy_(30 * directions.roll(1, 0))
        module = model.mtp_modules[0]
        identity = torch.eye(model.config.hidden_size)
        module.eh_proj.weight.copy_(torch.cat((identity, torch.zeros_like(identity)), dim=1))  # the embedding comes first
        for norm in (model.model.norm, module.enorm, module.hnorm, module.shared_head.norm):
            norm.weight.fill_(1.0)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafts", [0, 2])
def test_seeded_tokens_do_not_depend_on_the_company(backend: Backend, drafts: int) -> None:
    """Temperature, filters and penalties, alone and among others, with and without drafts."""
    model = build(V3_MTP)
    prompts = random_prompts(model.config.vocab_size)
    params = [
        SamplingParams(temperature=1.0, seed=3, max_tokens=ANSWER, ignore_eos=True),
        SamplingParams(temperature=0.7, top_p=0.9, seed=4, max_tokens=ANSWER, ignore_eos=True),
        SamplingParams(temperature=1.3, top_k=5, seed=5, max_tokens=ANSWER, ignore_eos=True, presence_penalty=1.0),
        SamplingParams(temperature=0.9, min_p=0.1, seed=6, max_tokens=ANSWER, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, seed=3, max_tokens=ANSWER, ignore_eos=True, logit_bias={7: 3.0}),
        SamplingParams(temperature=0.0, seed=3, max_tokens=ANSWER, ignore_eos=True, frequency_penalty=0.5),
    ]
    alone = [
        engine(model, backend="torch", max_num_batched_tokens=128).generate([prompt], [one])[0].token_ids
        for prompt, one in zip(prompts, params, strict=True)
    ]
    together = engine(model, backend=backend, num_speculative_tokens=drafts).generate(prompts, params)
    assert [output.token_ids for output in together] == alone


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafts", [0, 1])
def test_preemption_changes_no_token(backend: Backend, drafts: int) -> None:
    model = build(V3_MTP)
    prompts = random_prompts(model.config.vocab_size, (20, 22, 18, 24))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = transformers_greedy(model, prompts, 20)
    llm = engine(model, backend=backend, num_blocks=16, num_speculative_tokens=drafts)
    outputs = llm.generate(prompts, params)
    assert llm.scheduler_stats.num_preemptions > 0
    for prompt, output, tokens in zip(prompts, outputs, expected, strict=True):
        assert_same_tokens(model, prompt, output.token_ids, tokens)
    assert all_free(llm)


def soak(steps: int, seed: int, backend: Backend, drafts: int) -> None:
    """Random arrivals and aborts over a tiny cache; every answer that ends is the one of the request alone."""
    generator = random.Random(seed)
    model = build(V3_MTP)
    vocab = model.config.vocab_size
    shared = [generator.randrange(vocab) for _ in range(16)]
    llm = engine(model, backend=backend, num_blocks=24, num_speculative_tokens=drafts)
    reference = engine(model, backend="torch", max_num_batched_tokens=256, enable_prefix_caching=False)
    waiting: dict[int, tuple[list[int], SamplingParams, list[int]]] = {}
    finished = []
    for step in range(steps):
        if step < steps * 0.8 and generator.random() < 0.4:
            own = [generator.randrange(vocab) for _ in range(generator.randint(1, 25))]
            prompt = shared[: generator.choice([0, 4, 7, 16])] + own
            params = SamplingParams(
                temperature=generator.choice([0.0, 0.8]),
                seed=generator.randrange(100),
                max_tokens=generator.randint(1, 30),
                cache_key=generator.choice(["", "other"]),
            )
            waiting[llm.add(prompt, params)] = (prompt, params, [])
        if waiting and generator.random() < 0.05:
            request_id = generator.choice(list(waiting))
            llm.abort(request_id)
            del waiting[request_id]
        for increment in llm.step():
            prompt, params, tokens = waiting[increment.request_id]
            tokens += increment.token_ids
            if increment.finish_reason:
                finished.append(waiting.pop(increment.request_id))
    while llm.has_unfinished:
        for increment in llm.step():
            waiting[increment.request_id][2].extend(increment.token_ids)
            if increment.finish_reason:
                finished.append(waiting.pop(increment.request_id))
    assert not waiting
    assert all_free(llm)
    assert len(finished) > steps * 0.15
    for prompt, params, tokens in finished:
        expected = reference.generate([prompt], [params])[0].token_ids
        if params.temperature == 0:
            assert_same_tokens(model, prompt, tokens, expected)
        else:
            assert tokens == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_arrivals_and_aborts(backend: Backend) -> None:
    soak(steps=120, seed=0, backend=backend, drafts=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_a_long_soak(backend: Backend, drafts: int) -> None:
    for seed in range(5):
        soak(steps=2000, seed=100 + seed, backend=backend, drafts=drafts)


def test_prefixes_are_shared_under_one_key_only() -> None:
    model = build(CONFIGS["v3"])
    llm = engine(model)
    prompt = random_prompts(model.config.vocab_size, (23,))[0]

    def cached(key: str, prompt: list[int] = prompt) -> int:
        params = SamplingParams(temperature=0, max_tokens=1, cache_key=key)
        return llm.generate([prompt], params)[0].num_cached_tokens

    assert cached("a") == 0
    assert cached("b") == 0
    assert cached("a") == 20
    assert cached("a", prompt[:21]) == 20  # one token is left to compute
    assert cached("a", prompt[:20]) == 16
    llm.reset_prefix_cache()
    assert cached("a") == 0
    off = engine(model, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=1)
    assert [off.generate([prompt], params)[0].num_cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "block_size"), [("v3-mtp", 1), ("v3-mtp", 16), ("qwen3", 8)])
def test_samples_of_one_prompt_compute_it_once(name: str, block_size: int, backend: Backend) -> None:
    """Four answers to each of two prompts, as in a rollout: the tokens of each alone, and each prompt computed once but for its
    last, unfinished block."""
    model = build(CONFIGS[name])
    prompts = [prompt for prompt in random_prompts(model.config.vocab_size, (35, 42)) for _ in range(4)]
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=4, ignore_eos=True) for seed in range(8)]
    settings: dict[str, Any] = {"block_size": block_size, "backend": backend, "num_blocks": 400, "max_num_batched_tokens": 400}
    llm = engine(model, max_num_seqs=8, num_speculative_tokens=int(name == "v3-mtp"), **settings)
    outputs = llm.generate(prompts, params)
    tails = [(length - 1) % block_size + 1 for length in (35, 42)]
    stats = llm.scheduler_stats
    assert stats.prefix_query_tokens - stats.prefix_hit_tokens == 35 + 42 + 3 * sum(tails)
    alone = engine(model, enable_prefix_caching=False, **settings)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert output.token_ids == alone.generate(prompt, one)[0].token_ids
    assert all_free(llm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_step_leaves_nothing_behind(backend: Backend) -> None:
    """Ctrl-C in the middle of a prompt: what was not computed is not found in the prefix cache, and open streams go on."""
    model = build(CONFIGS["v3"])
    first, second = random_prompts(model.config.vocab_size, (13, 22))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = [output.token_ids for output in engine(model).generate([first, second], params)]
    llm = engine(model, backend=backend, max_num_batched_tokens=64)
    stream = llm.stream(first, params)
    tokens = next(stream).token_ids
    forward = llm._runner.forward

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    llm._runner.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([second, second, first], params)
    llm._runner.forward = forward  # type: ignore[method-assign]
    assert llm.generate([second], params)[0].token_ids == expected[1]
    assert tokens + [token for part in stream for token in part.token_ids] == expected[0]
    assert all_free(llm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_draft_pass_loses_no_token(backend: Backend) -> None:
    """Ctrl-C when a step's tokens are known already, again and again: each gets to whom it belongs, and answers end as ever."""
    model = build(V3_MTP)
    prompts = random_prompts(model.config.vocab_size, (13, 22, 5))
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=9 + seed, ignore_eos=True) for seed in range(3)]
    expected = [output.token_ids for output in engine(model).generate(prompts, params)]
    llm = engine(model, backend=backend, max_num_batched_tokens=64, num_speculative_tokens=1)
    stream = llm.stream(prompts[0], params[0])
    streamed = next(stream).token_ids
    added = {llm.add(prompts[i], params[i]): i for i in (1, 2)}
    draft, tokens, ends = llm._runner.draft, {1: list[int](), 2: list[int]()}, []

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    for step in range(40):
        llm._runner.draft = interrupted if step % 3 == 0 else draft  # type: ignore[method-assign]
        try:
            increments = llm.step()
        except KeyboardInterrupt:
            continue
        for increment in increments:
            tokens[added[increment.request_id]] += increment.token_ids
            ends += [increment.finish_reason] if increment.finish_reason else []
    parts = list(stream)
    assert [streamed + [token for part in parts for token in part.token_ids], tokens[1], tokens[2]] == expected
    assert [*ends, parts[-1].finish_reason] == ["length"] * 3
    assert all_free(llm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first_answer", [1, 7])
def test_drafts_after_a_prefix_hit_are_those_of_a_prompt_that_was_computed(first_answer: int, backend: Backend) -> None:
    """The MTP module sees the tokens of a request to the last that the prefix cache keeps, though the request ends in that step."""
    model = build(V3_MTP)
    prompt = random_prompts(model.config.vocab_size, (22,))[0]
    whole: dict[str, Any] = {"backend": backend, "max_num_batched_tokens": 64, "num_speculative_tokens": 1}
    cached, fresh = engine(model, **whole), engine(model, enable_prefix_caching=False, **whole)
    params = SamplingParams(temperature=0, max_tokens=first_answer, ignore_eos=True)
    prompt += [*cached.generate(prompt, params)[0].token_ids, 3]

    def drafts(llm: LLM) -> tuple[list[list[int]], torch.Tensor]:
        request_id = llm.add(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        request, found, rows = llm._answers[request_id].request, [], torch.empty(0)
        while llm.has_unfinished:
            llm.step()
            found.append(list(request.draft_token_ids))
            if len(found) == 1:
                rows = llm._runner.cache[-1, request.block_table].flatten(0, 1)[: len(prompt)].clone()
        assert request.num_cached_tokens == ((len(prompt) - 1) // 4 * 4 if llm is cached else 0)
        return found, rows

    (guesses, rows), (expected, expected_rows) = drafts(cached), drafts(fresh)
    assert guesses == expected
    torch.testing.assert_close(rows, expected_rows)


def test_answers_go_on_where_the_prompt_and_its_answer_were_cached() -> None:
    """The blocks of an answer are cached too: the next turn of a conversation finds them."""
    model = build(CONFIGS["v3"])
    llm = engine(model)
    prompt = random_prompts(model.config.vocab_size, (10,))[0]
    params = SamplingParams(temperature=0, max_tokens=11, ignore_eos=True)
    first = llm.generate([prompt], params)[0]
    second = llm.generate([prompt + first.token_ids + [3]], params)[0]
    assert second.num_cached_tokens == 20


def test_an_abort_frees_blocks_at_once_and_others_go_on() -> None:
    model = build(CONFIGS["v3"])
    llm = engine(model)
    prompts = random_prompts(model.config.vocab_size, (12, 13))
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = llm.generate(prompts, params)[1].token_ids
    first, second = (llm.add(prompt, params) for prompt in prompts)
    tokens = [token for _ in range(3) for i in llm.step() if i.request_id == second for token in i.token_ids]
    held = llm.num_free_blocks
    assert llm.abort(first)
    assert not llm.abort(first)
    assert llm.num_free_blocks > held
    while llm.has_unfinished:
        tokens += [token for increment in llm.step() for token in increment.token_ids]
    assert tokens == expected
    assert all_free(llm)


def test_closing_a_stream_aborts_it() -> None:
    model = build(CONFIGS["v3"])
    llm = engine(model)
    stream: Iterator[Any] = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    assert len(next(stream).token_ids) == 1
    stream.close()  # type: ignore[attr-defined]
    assert all_free(llm)
    parts = list(llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)))
    assert [part.finish_reason for part in parts] == [None] * 4 + ["length"]


def test_logprobs_are_those_of_the_model() -> None:
    model = build(V3_MTP)
    prompt = random_prompts(model.config.vocab_size, (9,))[0]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=6, logprobs=3, ignore_eos=True)
    for drafts in (0, 2):
        output = engine(model, num_speculative_tokens=drafts).generate([prompt], params)[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert output.logprobs is not None
        assert len(output.logprobs) == 6
        for row, token, entry in zip(expected, output.token_ids, output.logprobs, strict=True):
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


def test_bfloat16_logprobs_stay_near_float32() -> None:
    """The stated bound: on the same tokens, mean |difference| at most 0.05 of what bfloat16 gives and float32 does."""
    exact, model = build(CONFIGS["v3"]), build(CONFIGS["v3"], dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.copy_(rounded)
    prompts = random_prompts(exact.config.vocab_size)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, logprobs=0, ignore_eos=True)
    differences = []
    for backend in BACKENDS:
        for prompt, output in zip(prompts, engine(model, backend=backend).generate(prompts, params), strict=True):
            with torch.no_grad():
                rows = exact(torch.tensor([prompt + output.token_ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = rows.gather(1, torch.tensor(output.token_ids).unsqueeze(1)).squeeze(1)
            assert output.logprobs is not None
            actual = torch.tensor([entry.logprob for entry in output.logprobs])
            differences.append((actual - expected).abs())
    assert float(torch.cat(differences).mean()) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["v3-mtp", "qwen2"])
def test_changed_weights_are_those_of_a_fresh_engine(name: str, dtype: torch.dtype, backend: Backend) -> None:
    """Changed in place as by an optimizer, or given new data: bit for bit what an engine made afterwards gives."""
    model = build(CONFIGS[name], dtype=dtype)
    prompts = random_prompts(model.config.vocab_size)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=6, logprobs=0, ignore_eos=True)
    drafts = len(model.mtp_modules)
    llm = engine(model, backend=backend, num_speculative_tokens=drafts)
    before = llm.generate(prompts, params)
    generator = torch.Generator().manual_seed(0)
    for replace_data in (False, True):
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "bias" in n)):
            change = (1 + 0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            if replace_data:
                tensor.data = tensor.data * change
            else:
                tensor.data.mul_(change)
        llm.reset_prefix_cache()
        after = llm.generate(prompts, params)
        assert after != before
        assert after == engine(model, backend=backend, num_speculative_tokens=drafts).generate(prompts, params)
        before = after


def test_ends() -> None:
    """The model's end token, other stop tokens, max_tokens and the end of the context."""
    model = build(CONFIGS["v3"])
    prompt = random_prompts(model.config.vocab_size, (6,))[0]
    tokens = engine(model).generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].token_ids
    stop = tokens[3]
    first = tokens.index(stop)
    output = engine(model).generate([prompt], SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[stop]))[0]
    assert (output.token_ids, output.finish_reason) == (tokens[: first + 1], "stop")
    short = engine(model, max_model_len=10).generate([prompt], SamplingParams(temperature=0, ignore_eos=True))[0]
    assert (short.token_ids, short.finish_reason) == (tokens[:4], "length")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [4, 64])
def test_drafts_stay_within_the_context(backend: Backend, block_size: int) -> None:
    """Blocks may reach past the last position that is rotated; the answer ends there whatever is drafted."""
    model = build(V3_MTP)
    params = SamplingParams(temperature=0, ignore_eos=True)
    expected = engine(model).generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=7, ignore_eos=True))[0].token_ids
    for context in range(4, 11):
        llm = engine(model, max_model_len=context, block_size=block_size, num_speculative_tokens=4, backend=backend)
        draft, ends = llm._runner.draft, []

        def spy(chunks: Any, wanted: Any, hidden: Any, draft: Any = draft, ends: Any = ends) -> Any:
            ends += [chunk.start + len(chunk.token_ids) for chunk in chunks]
            return draft(chunks, wanted, hidden)

        llm._runner.draft = spy  # type: ignore[method-assign]
        assert llm.generate([1, 2, 3], params)[0].token_ids == expected[: context - 3]
        assert max(ends, default=0) <= context  # the native kernels would read past their table


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_num_seqs": 0, "num_blocks": None}, "max_num_seqs is 0"),
        ({"block_size": 0, "num_blocks": None}, "block_size is 0"),
        ({"max_model_len": 10_000}, "to the model's context"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 10**13}, r"num_blocks is 10000000000000: .* MiB of memory are free; give at most \d+$"),
        ({"num_speculative_tokens": 1}, "no MTP module"),
        ({"num_speculative_tokens": -1}, "at least 0"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4', it must be 'auto' .*'int8' or 'fp8'"),
    ],
)
def test_settings_that_cannot_be_used(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        engine(build(CONFIGS["v3"]), **fields)


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([96], {}, "token 96, outside"),
        ([-1], {}, "no token id"),
        ("text", {}, "no tokenizer"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
        ([1], {"logit_bias": {200: 1.0}}, "token 200, outside"),
        ([1], {"stop_token_ids": [96]}, "token 96, outside"),
        ([1] * 600, {}, "max_model_len"),
        ([1] * 200, {"max_tokens": 100}, "num_blocks"),
    ],
)
def test_requests_that_cannot_be_answered_leave_the_others_alone(prompt: Any, params: dict[str, Any], sentence: str) -> None:
    llm = engine(build(CONFIGS["v3"]))
    running = llm.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    llm.step()
    with pytest.raises(InputError, match=sentence):
        llm.add(prompt, SamplingParams(**params))
    with pytest.raises(InputError, match=sentence):
        llm.generate([[4, 5], prompt], SamplingParams(**params))
    tokens = [i for _ in range(2) for i in llm.step()]
    assert [i.request_id for i in tokens] == [running, running]
    assert tokens[-1].finish_reason == "length"
    assert all_free(llm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_that_fails_leaves_the_others_alone(backend: Backend, temperature: float, drafts: int) -> None:
    """One token has an embedding of NaN. Its request ends with a sentence, and nothing of it stays in the cache."""
    model = build(V3_MTP)
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = torch.nan
    fine = [[token for token in prompt if token != 50] for prompt in random_prompts(model.config.vocab_size, (9, 2, 21))]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=8, ignore_eos=True, logit_bias={50: -100.0})
    expected = [output.token_ids for output in engine(model).generate(fine, params)]
    llm = engine(model, backend=backend, num_speculative_tokens=drafts)
    for _ in range(3):
        outputs = llm.generate([[50, *fine[2]], *fine, [1, 50]], params)
        assert [output.finish_reason for output in outputs] == ["error", "length", "length", "length", "error"]
        assert "logits are NaN" in str(outputs[0].error)
        assert outputs[0].token_ids == []
        assert [output.token_ids for output in outputs[1:4]] == expected
        assert outputs[1].error is None
        assert all_free(llm)
    with pytest.raises(InputError, match="logits are NaN"):
        list(llm.stream([50], params))
    assert all_free(llm)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(["The fox saw the grapes."] * 20, vocab_size=290)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_grammar_that_has_ended_goes_on_with_stop_tokens(drafts: int, trained: Tokenizer) -> None:
    """With `ignore_eos`, where every draft is the stop token and the model itself wants something else behind it."""
    model = predictable(trained.vocab_size)
    torch.nn.init.zeros_(model.mtp_modules[0].eh_proj.weight)
    llm = engine(model, tokenizer=trained, num_speculative_tokens=drafts)
    stop, letter = trained.eos_token_id, trained.encode("a")
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, grammar=Grammar.regex("a"), logit_bias={stop: 1.0})
    output = llm.generate([5], params)[0]
    assert (output.token_ids, output.finish_reason, output.error) == (letter + [stop] * 6, "length", None)
    assert llm.stats.accepted_tokens == (4 if drafts else 0)


@pytest.mark.parametrize("method", ["advance", "masks"])
def test_a_matcher_that_fails_ends_its_own_request(method: str, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise ValueError("token 7 is not allowed by the grammar")

    llm = engine(build(replace(V3_MTP, vocab_size=trained.vocab_size)), tokenizer=trained, num_speculative_tokens=1)
    params = SamplingParams(temperature=0, max_tokens=4, grammar=Grammar.regex("[a-z]{9}"))
    (alone,) = llm.generate([[1, 2]], params)
    failed, fine = llm.add([1, 2], params), llm.add([1, 2], params)
    monkeypatch.setattr(llm._answers[failed].matcher, method, failing)
    tokens: list[int] = []
    while llm.has_unfinished:
        for increment in llm.step():
            if increment.request_id == failed:
                assert (increment.token_ids, increment.finish_reason) == ([], "error")
                assert increment.error == "token 7 is not allowed by the grammar"
            else:
                assert increment.request_id == fine
                tokens += increment.token_ids
    assert tokens == alone.token_ids
    assert all_free(llm)


def test_a_stream_gives_an_empty_piece_for_each_step_of_a_long_prompt() -> None:
    """So that whoever reads it can stop before the answer begins."""
    llm = engine(build(CONFIGS["v3"]), max_num_batched_tokens=4)
    parts = list(llm.stream([1] * 15, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
    assert [len(part.token_ids) for part in parts] == [0, 0, 0, 1, 1]
    assert [part.finish_reason for part in parts] == [None] * 4 + ["length"]


def test_prompts_as_arrays_and_tensors() -> None:
    llm = engine(build(CONFIGS["v3"]))
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate([[1, 2, 3], [4, 5, 6]], params)]
    prompts: Any
    for prompts in (
        np.array([[1, 2, 3], [4, 5, 6]]),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        ((1, 2, 3), (4, 5, 6)),
        [torch.tensor([1, 2, 3], dtype=torch.int32), np.array([4, 5, 6])],
    ):
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.generate(prompts[0], params)[0].token_ids == expected[0]
    for prompts in ([True], torch.tensor([True])):
        with pytest.raises(InputError, match="which is no token id"):
            llm.generate(prompts, params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_may_come_and_go(backend: Backend) -> None:
    model = build(V3_MTP)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with torch.inference_mode():
        llm = engine(model, backend=backend, num_speculative_tokens=2)
        first = llm.generate([1, 2, 3], params)
    assert llm.generate([1, 2, 3], params) == first
    with torch.inference_mode():
        assert llm.generate([1, 2, 3], params) == first


def test_what_is_told_by_a_path_or_a_name(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is the user's home, a tokenizer may be the directory of one, and a device must be one of this machine."""
    save_tokenizer(trained, tmp_path / "tokenizer")
    save(build(replace(CONFIGS["v3"], vocab_size=290)), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = LLM(tmp_path / "model", tokenizer=trained, num_blocks=4).generate("The fox", params)
    for path in ("~/tokenizer", tmp_path / "tokenizer"):
        assert LLM("~/model", tokenizer=path, num_blocks=4).generate("The fox", params) == expected
    with pytest.raises(InputError, match="holds no tokenizer"):
        LLM("~/model", tokenizer="~/model")
    for device in ("cuda:99", "gpu", torch.device("cuda:99")):
        with pytest.raises(
            InputError, match=f"device is '{device}', which torch cannot use here; leave it out to run on the CPU"
        ):
            LLM("~/model", device=device)


def test_either_a_directory_or_a_model() -> None:
    with pytest.raises(InputError, match="a directory or model"):
        LLM()
    with pytest.raises(InputError, match="2 prompts and 1 params"):
        engine(build(CONFIGS["v3"])).generate([[1], [2]], [SamplingParams()])
