"""The scheduler under any order of arrivals and aborts: no leak, no double use, no starvation, every answer as if run alone."""

import random
import re
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from finback.config import InputError
from finback.engine.blocks import BlockManager
from finback.engine.config import SamplingParams
from finback.engine.request import Request, RequestState
from finback.engine.scheduler import Scheduler
from tests.engine.simulated import END, SimulatedEngine, next_token, run_alone

BASES = [[1] * 40, [1, 2] * 20, [1] * 8 + [3, 4, 2, 1] * 8]  # prompts begin like these, so that prefixes are shared


class EngineMachine(RuleBasedStateMachine):
    """Requests come, step, are aborted, and the weights change, at any time; also between a step's schedule and its end."""

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 5),
        caching=st.booleans(),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 20),
        max_model_len=st.integers(2, 40),
    )
    def start(self, **sizes: Any) -> None:
        self.engine = SimulatedEngine(**sizes)

    @rule(
        base=st.sampled_from(BASES),
        length=st.integers(1, 30),
        tail=st.lists(st.integers(0, 4), max_size=3),
        max_tokens=st.none() | st.integers(1, 12),
        cache_key=st.sampled_from(["", "", "other"]),
        seed=st.integers(0, 1),
    )
    def add(self, base: list[int], length: int, tail: list[int], max_tokens: int | None, cache_key: str, seed: int) -> None:
        prompt, engine = base[:length] + tail, self.engine
        context, pool = engine.scheduler.max_model_len, engine.blocks.num_blocks * engine.blocks.block_size + 1
        longest = len(prompt) + min(max_tokens or 1, context - len(prompt))
        fits = len(prompt) < context and longest <= pool
        if fits:
            request = engine.add(prompt, max_tokens, cache_key, seed)
            assert len(prompt) + request.max_tokens <= min(context, pool)
            assert request.max_tokens == (max_tokens and min(max_tokens, context - len(prompt))) or max_tokens is None
        else:
            before = engine.scheduler.stats()
            with pytest.raises(InputError, match=r"raise (max_model_len|num_blocks)"):
                engine.add(prompt, max_tokens, cache_key, seed)
            assert engine.scheduler.stats() == before

    @rule(base=st.sampled_from(BASES), lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4), same=st.booleans())
    def add_some_and_step(self, base: list[int], lengths: list[int], same: bool) -> None:
        """Prompts with a common prefix, or equal ones, in one instant."""
        engine = self.engine
        longest = min(engine.scheduler.max_model_len - 1, engine.blocks.num_blocks * engine.blocks.block_size)
        for seed, length in enumerate(lengths):
            engine.add(base[: min(lengths[0] if same else length, longest)], None, seed=seed)
        engine.step()

    @rule(pick=st.integers(0, 30))
    def abort(self, pick: int) -> None:
        self.engine.abort(pick)

    @rule()
    def change_weights(self) -> None:
        self.engine.change_weights()

    @rule(drafts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=5))
    def propose(self, drafts: list[tuple[int, int]]) -> None:
        """For some running requests, drafts of which the first few are right."""
        running = [r for r in self.engine.requests.values() if r.state is RequestState.RUNNING]
        for request, (right, wrong) in zip(running, drafts, strict=False):
            tokens = list(request.token_ids)
            for _ in range(right):
                tokens.append(next_token(request, tokens))
            request.draft_token_ids = tokens[request.num_tokens :] + [1] * wrong

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @rule(pick=st.integers(0, 30), prompt=st.lists(st.integers(1, 2), min_size=1, max_size=3), weights=st.booleans())
    def step_with_interruptions(self, pick: int, prompt: list[int], weights: bool) -> None:
        scheduled = self.engine.start_step()
        self.engine.abort(pick)
        if weights:
            self.engine.change_weights()
        if len(prompt) < min(self.engine.scheduler.max_model_len, self.engine.blocks.num_blocks * self.engine.blocks.block_size):
            self.engine.add(prompt, 1)
        self.engine.end_step(scheduled)

    @rule()
    def fail(self) -> None:
        self.engine.fail_step()

    @invariant()
    def every_rule_holds(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            stats = self.engine.scheduler.stats()
            assert stats.num_running + stats.num_waiting == len(self.engine.requests)
            assert stats.blocks_used + stats.blocks_cached + stats.blocks_free == self.engine.blocks.num_blocks

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run_to_the_end()


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestAnyOrder = EngineMachine.TestCase


@pytest.mark.slow
class TestAnyOrderLong(EngineMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=500, stateful_step_count=80)


@pytest.mark.parametrize("seed", range(4))
def test_a_crowded_pool_serves_everybody(seed: int) -> None:
    """Random arrivals into a pool that holds about three requests: preemptions, hits and drafts all occur."""
    rng = random.Random(seed)
    engine = SimulatedEngine(num_blocks=14, block_size=4, caching=seed % 2 == 0, max_num_seqs=6, budget=16, max_model_len=48)
    for _ in range(150):
        if rng.random() < 0.3:
            prompt = rng.choice(BASES)[: rng.randint(1, 24)] + [rng.randrange(5) for _ in range(rng.randrange(4))]
            engine.add(prompt, rng.randint(1, 20), rng.choice(["", "a"]), seed=rng.randrange(3))
        if rng.random() < 0.05 and engine.requests:
            engine.abort(rng.choice(list(engine.requests)))
        for request in engine.requests.values():
            if request.state is RequestState.RUNNING and rng.random() < 0.5:
                request.draft_token_ids = [next_token(request, request.token_ids), 1, 2]
        engine.step()
    engine.run_to_the_end()
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 0
    assert engine.drafts_accepted > 0
    assert (stats.prefix_hit_tokens > 0) == engine.blocks.enable_prefix_caching


def make(
    num_blocks: int = 16, block_size: int = 4, max_num_seqs: int = 4, budget: int = 64, max_model_len: int = 64
) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget, max_model_len)


def request_of(request_id: int, prompt: list[int], max_tokens: int | None = 8, **values: Any) -> Request:
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens, **values), seed=0)


def step(scheduler: Scheduler, token: int = 7) -> list[tuple[int, int, int, int]]:
    """One step of a model that always gives `token` and takes no draft: (id, start, count, drafts) of each sequence."""
    scheduled = scheduler.schedule().scheduled
    for sequence in scheduled:
        scheduler.advance(sequence, [token] if sequence.samples else [])
    return [(s.request.request_id, s.start, s.count, s.num_drafts) for s in scheduled]


def test_decode_rows_and_prefill_chunks_share_the_budget() -> None:
    scheduler = make(budget=10)
    scheduler.add(request_of(0, [1] * 3))
    scheduler.add(request_of(1, [2] * 15))
    scheduler.add(request_of(2, [3] * 3))
    assert step(scheduler) == [(0, 0, 3, 0), (1, 0, 7, 0)]
    assert step(scheduler) == [(0, 3, 1, 0), (1, 7, 8, 0), (2, 0, 1, 0)]
    assert step(scheduler) == [(0, 4, 1, 0), (1, 15, 1, 0), (2, 1, 2, 0)]
    assert step(scheduler) == [(0, 5, 1, 0), (1, 16, 1, 0), (2, 3, 1, 0)]


def test_only_the_last_chunk_samples() -> None:
    scheduler = make(budget=4)
    scheduler.add(request := request_of(0, [1] * 9))
    samples = []
    for _ in range(4):
        (sequence,) = scheduler.schedule().scheduled
        samples.append(sequence.samples)
        scheduler.advance(sequence, [7] if sequence.samples else [])
    assert samples == [False, False, True, True]
    assert request.output_token_ids == [7, 7]
    assert request.token_ids == [1] * 9 + [7, 7]
    assert request.num_computed_tokens == 10


def test_a_head_that_does_not_fit_holds_back_those_behind_it() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add(request_of(0, [1] * 16))
    scheduler.add(request_of(1, [2] * 12))  # needs 3 blocks, 2 are left
    scheduler.add(request_of(2, [3] * 2))  # would fit
    assert step(scheduler) == [(0, 0, 16, 0)]
    assert step(scheduler) == [(0, 16, 1, 0)]
    scheduler.abort(1)
    assert step(scheduler) == [(0, 17, 1, 0), (2, 0, 2, 0)]


def test_slots_limit_the_running_requests() -> None:
    scheduler = make(max_num_seqs=2)
    for number in range(3):
        scheduler.add(request_of(number, [1]))
    assert [row[0] for row in step(scheduler)] == [0, 1]
    scheduler.abort(0)
    assert [row[0] for row in step(scheduler)] == [1, 2]


def test_the_latest_is_preempted_and_comes_back_first_with_its_answer() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add(request_of(0, [1] * 4))
    scheduler.add(late := request_of(1, [2] * 4))
    scheduler.add(request_of(2, [3] * 4))
    assert step(scheduler) == [(0, 0, 4, 0), (1, 0, 4, 0), (2, 0, 4, 0)]
    schedule = scheduler.schedule()  # each wants a second block: 0 takes the free one, 1 that of 2
    assert [(r.request_id, r.num_computed_tokens) for r in schedule.preempted] == [(2, 0)]
    assert [s.request.request_id for s in schedule.scheduled] == [0, 1]
    for sequence in schedule.scheduled:
        scheduler.advance(sequence, [7])
    scheduler.finish(late, "stop")
    assert step(scheduler) == [(0, 5, 1, 0), (2, 0, 5, 0)]  # its one block was overwritten; prompt and first answer token again
    assert scheduler.stats().num_preemptions == 1


def test_a_preempted_request_finds_its_own_prefix() -> None:
    scheduler = make(num_blocks=6)
    scheduler.add(request_of(0, [1] * 4))
    scheduler.add(late := request_of(1, [2] * 10))
    for _ in range(5):
        assert [row[0] for row in step(scheduler)] == [0, 1]  # at the end they hold 2 and 4 blocks
    schedule = scheduler.schedule()  # 0 wants a third block and gets the unfinished one of 1
    assert schedule.preempted == [late]
    for sequence in schedule.scheduled:
        scheduler.advance(sequence, [7])
    assert late.output_token_ids == [7] * 5
    scheduler.abort(0)
    assert step(scheduler) == [(1, 12, 3, 0)]
    assert late.num_cached_tokens == 0  # told to the user: what the first admission found
    assert scheduler.stats().prefix_hit_tokens == 0


def test_a_wholly_cached_prompt_still_computes_a_token() -> None:
    scheduler = make()
    scheduler.add(first := request_of(0, [1] * 8))
    step(scheduler)
    scheduler.finish(first, "stop")
    scheduler.add(second := request_of(1, [1] * 8))
    assert step(scheduler) == [(1, 4, 4, 0)]
    assert second.num_cached_tokens == 4
    scheduler.add(third := request_of(2, [1] * 9))
    assert step(scheduler) == [(1, 8, 1, 0), (2, 8, 1, 0)]
    assert third.num_cached_tokens == 8
    assert third.block_table[:2] == second.block_table[:2]
    stats = scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (25, 12)


def test_a_hit_counts_against_the_budget_only_where_it_computes() -> None:
    scheduler = make(budget=8)
    scheduler.add(request_of(0, [1] * 8))
    step(scheduler)
    scheduler.add(request_of(1, [1] * 12 + [2]))
    assert step(scheduler) == [(0, 8, 1, 0), (1, 8, 5, 0)]


@pytest.mark.parametrize(("length", "block_size", "computed"), [(26, 4, 26 + 7 * 2), (24, 4, 24 + 7 * 4), (20, 16, 20 + 7 * 4)])
def test_equal_prompts_that_start_together_are_computed_once(length: int, block_size: int, computed: int) -> None:
    """But for what is left beyond whole blocks, of which the next token is sampled."""
    scheduler = make(num_blocks=64, block_size=block_size, max_num_seqs=8, budget=512)
    for number in range(8):
        scheduler.add(request_of(number, list(range(length))))
    rows = step(scheduler)
    assert [row[0] for row in rows] == list(range(8))
    assert sum(count for _, _, count, _ in rows) == computed
    stats = scheduler.stats()
    assert stats.prefix_query_tokens - stats.prefix_hit_tokens == computed
    assert [count for _, _, count, _ in step(scheduler)] == [1] * 8


def test_who_starts_shares_what_one_that_runs_computes_in_this_step() -> None:
    scheduler = make(budget=10)
    scheduler.add(early := request_of(0, [1] * 15))
    assert step(scheduler) == [(0, 0, 10, 0)]
    scheduler.add(late := request_of(1, [1] * 14))
    scheduler.add(request_of(2, [1] * 14, cache_key="other"))
    assert step(scheduler) == [(0, 10, 5, 0), (1, 12, 2, 0), (2, 0, 3, 0)]
    assert late.block_table[:3] == early.block_table[:3]
    assert late.block_table[3] != early.block_table[3]


def test_rows_of_old_weights_are_not_shared() -> None:
    scheduler = make(budget=10)
    scheduler.add(request_of(0, [1] * 15))
    step(scheduler)
    scheduler.blocks.reset_prefix_cache()
    scheduler.add(request_of(1, [1] * 14))
    assert step(scheduler) == [(0, 10, 5, 0), (1, 0, 5, 0)]


def test_drafts_are_not_shared() -> None:
    """[1, 1, 1, 7] is what 1 begins with, but the 7 of 0 is only a guess."""
    scheduler = make()
    scheduler.add(early := request_of(0, [1, 1, 1], 20))
    step(scheduler, token=5)
    early.draft_token_ids = [7, 7, 7, 7]
    scheduler.add(request_of(1, [1, 1, 1, 5, 7, 7, 7, 7, 9]))
    assert [(s.request.request_id, s.start) for s in scheduler.schedule().scheduled] == [(0, 3), (1, 4)]


def test_after_a_failure_everybody_starts_over() -> None:
    scheduler = make()
    for number in range(3):
        scheduler.add(request_of(number, [1] * 8))
    step(scheduler)
    scheduler.add(request_of(3, [1] * 8))
    scheduler.schedule()  # the model fails
    scheduler.restart()
    assert scheduler.stats().blocks_free == scheduler.blocks.num_blocks
    assert step(scheduler) == [(0, 0, 9, 0), (1, 8, 1, 0), (2, 8, 1, 0), (3, 4, 4, 0)]


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "drafts", "expected"),
    [
        ({}, 8, 3, 3),
        ({"budget": 3}, 8, 5, 2),
        ({"budget": 1}, 8, 5, 0),
        ({}, 4, 5, 2),  # one token is given already, and the step gives one besides the drafts
        ({}, 2, 5, 0),
        ({"max_model_len": 6}, 8, 5, 1),
        ({"num_blocks": 2}, 6, 5, 4),
    ],
)
def test_drafts_are_trimmed_to_what_fits(sizes: dict[str, int], max_tokens: int, drafts: int, expected: int) -> None:
    scheduler = make(**sizes)
    scheduler.add(request := request_of(0, [1, 1, 1], max_tokens))
    while not request.output_token_ids:
        step(scheduler)
    request.draft_token_ids = list(range(10, 10 + drafts))
    (sequence,) = scheduler.schedule().scheduled
    assert (sequence.start, sequence.count, sequence.num_drafts) == (3, 1 + expected, expected)
    assert sequence.token_ids == [7, *range(10, 10 + expected)]
    assert request.draft_token_ids == list(range(10, 10 + expected))


def test_drafts_take_neither_the_budget_nor_the_block_of_a_decode_row() -> None:
    scheduler = make(num_blocks=3, budget=5)
    scheduler.add(early := request_of(0, [1] * 3, 5))
    scheduler.add(late := request_of(1, [2] * 2, 5))
    step(scheduler)
    early.draft_token_ids, late.draft_token_ids = [8] * 4, [9] * 2
    schedule = scheduler.schedule()
    rows = [(s.request.request_id, s.start, s.count, s.num_drafts) for s in schedule.scheduled]
    assert rows == [(0, 3, 4, 3), (1, 2, 1, 0)]  # three tokens of budget besides the two rows
    for sequence in schedule.scheduled:
        scheduler.advance(sequence, [7])
    assert [len(early.block_table), len(late.block_table)] == [2, 1]
    scheduler.finish(early, "stop")

    scheduler.add(request_of(2, [3] * 4, 5))
    assert step(scheduler) == [(1, 3, 1, 0), (2, 0, 4, 0)]
    late.draft_token_ids = [9] * 4  # 1 wants its second block now, and so does 2: one of them is left
    schedule = scheduler.schedule()
    assert [(s.request.request_id, s.start, s.count, s.num_drafts) for s in schedule.scheduled] == [(1, 4, 2, 1)]
    assert [request.request_id for request in schedule.preempted] == [2]


def test_drafts_preempt_nobody() -> None:
    scheduler = make(num_blocks=3)
    scheduler.add(early := request_of(0, [1] * 3, 6))
    scheduler.add(late := request_of(1, [2] * 4, 6))
    step(scheduler)
    early.draft_token_ids = [8] * 4  # would need the last block, which 1 needs for its row
    schedule = scheduler.schedule()
    assert [(s.request.request_id, s.start, s.count, s.num_drafts) for s in schedule.scheduled] == [(0, 3, 1, 0), (1, 4, 1, 0)]
    assert schedule.preempted == []
    assert early.draft_token_ids == []
    assert [len(early.block_table), len(late.block_table)] == [1, 2]


def test_accepted_drafts_are_kept_and_the_rest_forgotten() -> None:
    scheduler = make()
    scheduler.add(request := request_of(0, [1, 1, 1], 20))
    step(scheduler)
    request.draft_token_ids = [10, 11, 12, 13, 14, 15]
    (sequence,) = scheduler.schedule().scheduled
    assert (sequence.start, sequence.count, len(request.block_table)) == (3, 7, 3)
    scheduler.advance(sequence, [10, 11, 99])
    assert request.output_token_ids == [7, 10, 11, 99]
    assert request.num_computed_tokens == 6
    assert request.draft_token_ids == []
    assert len(request.block_table) == 2
    assert request.num_registered_blocks == 1  # [1, 1, 1, 7], not the block that rejected drafts filled
    assert step(scheduler) == [(0, 6, 1, 0)]


def test_a_step_that_ends_an_answer_inside_its_drafts() -> None:
    scheduler = make()
    scheduler.add(request := request_of(0, [1, 1, 1]))
    step(scheduler)
    request.draft_token_ids = [10, END, 12]
    (sequence,) = scheduler.schedule().scheduled
    scheduler.advance(sequence, [10, END])  # all three were right, but the answer ends at the second
    scheduler.finish(request, "stop")
    assert request.output_token_ids == [7, 10, END]
    assert request.finish_reason == "stop"
    assert scheduler.stats().blocks_used == 0


@pytest.mark.parametrize("state", ["waiting", "running", "between schedule and advance", "preempted"])
def test_abort_frees_the_blocks_at_once(state: str) -> None:
    scheduler = make(num_blocks=4)
    scheduler.add(request_of(0, [1] * 8, 6))
    scheduler.add(request := request_of(1, [2] * 8, 6))
    sequences = []
    if state != "waiting":
        step(scheduler)
    if state == "between schedule and advance":
        scheduler.abort(0)
        sequences = scheduler.schedule().scheduled
    if state == "preempted":
        assert scheduler.schedule().preempted == [request]
    assert scheduler.abort(1) is request
    assert scheduler.abort(1) is None
    assert request.block_table == []
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, "abort")
    for sequence in sequences:
        scheduler.advance(sequence, [7])
    assert request.num_tokens == 8 + (state != "waiting")
    scheduler.abort(0)
    assert not scheduler.has_unfinished
    assert scheduler.stats().blocks_used == 0
    assert scheduler.schedule().scheduled == []


def test_an_unknown_abort_is_none() -> None:
    assert make().abort(5) is None


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 8, "the prompt is empty; give at least one token"),
        ([1, -2], 8, "the prompt holds -2, which is no token id; give whole numbers of at least 0"),
        ([1, 2**31], 8, f"the prompt holds {2**31}, which is no token id"),
        ([1, True], 8, "the prompt holds True, which is no token id"),
        ([1, 2.0], 8, "the prompt holds 2.0, which is no token id"),
        ([1, float("nan")], 8, "the prompt holds nan, which is no token id"),
        ([1, "2"], 8, "the prompt holds '2', which is no token id"),
        ([1, None], 8, "the prompt holds None, which is no token id"),
        (
            [1] * 64,
            8,
            "the prompt has 64 tokens, which leaves no room for an answer within max_model_len (64);"
            " shorten the prompt or raise max_model_len to 65 or more",
        ),
        (
            [1] * 30,
            20,
            "the prompt (30 tokens) with max_tokens 20 needs 13 cache blocks of 4 tokens, and there are 10;"
            " lower max_tokens to 11 or raise num_blocks to 13 or more",
        ),
        ([1] * 50, None, "the prompt (50 tokens) with max_tokens 1 needs 13 cache blocks of 4 tokens, and there are 10; shorten"),
        (
            [1] * 41,
            1,
            "needs 11 cache blocks of 4 tokens, and there are 10; shorten the prompt or raise num_blocks to 11 or more",
        ),
    ],
)
def test_what_can_never_run_is_refused_and_the_others_go_on(prompt: list[Any], max_tokens: int | None, words: str) -> None:
    scheduler = make(num_blocks=10)
    scheduler.add(request_of(0, [1]))
    wrong = request_of(1, [1], max_tokens)
    wrong.prompt_token_ids = prompt  # given to the constructor, the tests' own type checks would come first
    with pytest.raises(InputError, match=re.escape(words)):
        scheduler.add(wrong)
    assert scheduler.abort(1) is None
    assert step(scheduler) == [(0, 0, 1, 0)]


@pytest.mark.parametrize(
    ("length", "max_tokens", "resolved"),
    [
        (40, 1, 1),  # the last token of an answer takes no room in the cache
        (40, None, 1),
        (30, 11, 11),
        (30, None, 11),
        (1, None, 40),
        (10, 4000, None),
    ],
)
def test_max_tokens_is_resolved(length: int, max_tokens: int | None, resolved: int | None) -> None:
    scheduler = make(num_blocks=10)
    request = request_of(0, [1] * length, max_tokens)
    if resolved is None:
        with pytest.raises(InputError, match="with max_tokens 54 needs 16 cache blocks"):  # cut to the context first
            scheduler.add(request)
    else:
        scheduler.add(request)
        assert request.max_tokens == resolved


def test_the_default_answer_is_4096_tokens_at_most() -> None:
    scheduler = make(num_blocks=10_000, max_model_len=20_000)
    scheduler.add(request := request_of(0, [1] * 10, None))
    assert request.max_tokens == 4096


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_sizes_below_one_are_refused(name: str, value: Any) -> None:
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1} | {name: value}
    with pytest.raises(InputError, match=f"field {name} is {value}, it must be a whole number of at least 1"):
        Scheduler(BlockManager(1), **sizes)


def test_run_alone_is_what_one_request_gives() -> None:
    engine = SimulatedEngine(num_blocks=20, block_size=4, caching=True, max_num_seqs=1, budget=100, max_model_len=60)
    request = engine.add([1, 2, 3], 10)
    expected = run_alone(request)
    engine.run_to_the_end()
    assert request.output_token_ids == expected
