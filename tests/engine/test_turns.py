"""Streams, calls of `generate` and users of `step` in one engine, by turns in any order: each gets the answer of its request alone."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.data.tokenizer import train_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.output import Increment, RequestOutput
from tests.engine.models import V3_MTP
from tests.model.oracle import build

TEXT = ["The fox saw the grapes and could not reach them. 狐狸看见葡萄，却够不着。"] * 20
PROMPTS = ["The fox", "the grapes and", "reach", "The fox saw the grapes and could not reach them. The", "狐狸看见", "not "]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.0, seed=1, max_tokens=14, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=0.8, seed=2, max_tokens=1, logprobs=1),
    SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, top_k=5),
    SamplingParams(temperature=1.2, seed=4, max_tokens=11, ignore_eos=True, skip_special_tokens=False, logprobs=0),
    SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True, stop=("e",)),
]
REQUESTS = range(len(PROMPTS))


def engine(drafts: int) -> LLM:
    tokenizer = train_tokenizer(TEXT, vocab_size=300)
    model = build(replace(V3_MTP, vocab_size=tokenizer.vocab_size))
    return LLM(
        model=model,
        tokenizer=tokenizer,
        block_size=4,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        num_blocks=40,
        num_speculative_tokens=drafts,
    )


@cache
def shared(drafts: int) -> tuple[LLM, list[RequestOutput]]:
    """An engine, and the answer to each request alone."""
    llm = engine(drafts)
    return llm, [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def joined(llm: LLM, request: int, parts: list[Increment]) -> RequestOutput:
    assert llm.tokenizer is not None
    output = RequestOutput(llm.tokenizer.encode(PROMPTS[request], add_bos=llm.tokenizer.add_bos_token))
    for part in parts:
        output.add(part)
    return output


def assert_same(actual: RequestOutput, expected: RequestOutput) -> None:
    assert actual.token_ids == expected.token_ids
    assert (actual.text, actual.finish_reason, actual.error) == (expected.text, expected.finish_reason, None)
    assert actual.stop_reason == expected.stop_reason
    assert (actual.logprobs is None) == (expected.logprobs is None)
    mine, others = actual.logprobs or [], expected.logprobs or []
    assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in others], abs=1e-4)
    assert [[token for token, _ in one.top] for one in mine] == [[token for token, _ in one.top] for one in others]


def test_an_answer_names_the_stop_text_that_ended_it() -> None:
    llm, _ = shared(0)
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    whole = llm.generate(PROMPTS[0], plain)[0]
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    stop = whole.text[3:5]
    cut = llm.generate(PROMPTS[0], replace(plain, stop=("never", stop)))[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[: whole.text.index(stop)], "stop", stop)
    token = llm.generate(PROMPTS[0], replace(plain, stop_token_ids=(whole.token_ids[2],)))[0]
    assert (token.finish_reason, token.stop_reason) == ("stop", None)


ACTIONS = st.one_of(
    st.tuples(st.just("stream"), st.sampled_from(REQUESTS)),
    st.tuples(st.just("next"), st.integers(0, 9)),
    st.tuples(st.just("next"), st.integers(0, 9)),
    st.tuples(st.just("add"), st.sampled_from(REQUESTS)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("generate"), st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=4)),
    st.tuples(st.just("close"), st.integers(0, 9)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
)


@pytest.mark.parametrize("drafts", [0, 2])
@given(actions=st.lists(ACTIONS, max_size=30))
@settings(max_examples=12)
def test_by_turns_in_any_order_nothing_is_lost(drafts: int, actions: list[tuple[str, Any]]) -> None:
    llm, alone = shared(drafts)
    streams: list[tuple[int, Generator[Increment, None, None], list[Increment]]] = []
    added: dict[int, tuple[int, list[Increment]]] = {}

    def step() -> None:
        for part in llm.step():
            added[part.request_id][1].append(part)  # nobody else's

    for action, value in actions:
        if action == "stream":
            stream = llm.stream(PROMPTS[value], PARAMS[value])
            assert isinstance(stream, Generator)
            streams.append((value, stream, []))
        elif action == "next" and streams:
            _, stream, parts = streams[value % len(streams)]
            parts += [part for part in [next(stream, None)] if part is not None]
        elif action == "add":
            added[llm.add(PROMPTS[value], PARAMS[value])] = (value, [])
        elif action == "step":
            step()
        elif action == "generate":
            outputs = llm.generate([PROMPTS[i] for i in value], [PARAMS[i] for i in value])
            for request, output in zip(value, outputs, strict=True):
                assert_same(output, alone[request])
        elif action == "close" and streams:
            request, stream, parts = streams.pop(value % len(streams))
            stream.close()
            tokens = [token for part in parts for token in part.token_ids]
            assert tokens == alone[request].token_ids[: len(tokens)]
        elif action == "abort" and added:
            request_id = list(added)[value % len(added)]
            llm.abort(request_id)
            del added[request_id]
    for request, stream, parts in streams[::-1]:
        assert_same(joined(llm, request, [*parts, *stream]), alone[request])
    while llm.has_unfinished:
        step()
    for request, parts in added.values():
        assert_same(joined(llm, request, parts), alone[request])
    assert llm.num_free_blocks == llm.num_blocks


def test_streams_read_by_turns_share_their_steps() -> None:
    """Two streams of n tokens, one piece of each at a time, take about n steps."""
    llm = engine(drafts=0)
    before = llm.stats.steps
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    first, second = (llm.stream([5, 6, token], params) for token in (7, 8))
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) == 10
    assert llm.stats.steps - before <= 12


def test_generate_inside_a_stream_keeps_the_streams_pieces() -> None:
    llm, alone = shared(0)
    parts: list[Increment] = []
    stream: Iterator[Increment] = llm.stream(PROMPTS[1], PARAMS[1])
    for part in stream:
        parts.append(part)
        assert_same(llm.generate(PROMPTS[4], PARAMS[4])[0], alone[4])
    assert_same(joined(llm, 1, parts), alone[1])


def test_an_aborted_stream_ends() -> None:
    """By the id that its pieces carry, from outside; also when pieces are waiting."""
    llm = engine(drafts=0)
    stream = llm.stream([5, 6], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    part = next(stream)
    llm.generate([7], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert llm.abort(part.request_id)
    assert list(stream) == []
    assert not llm.has_unfinished
