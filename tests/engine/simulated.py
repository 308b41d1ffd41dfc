"""An engine without a model: cache rows hold the very prefix that they were computed from, and every rule is checked at every step."""

import random
from hashlib import sha256

from finback.engine.blocks import BlockManager
from finback.engine.config import SamplingParams
from finback.engine.request import Request, RequestState
from finback.engine.scheduler import ScheduledSequence, Scheduler

END = 0  # the simulated model's end-of-sequence token


def next_token(request: Request, prefix: list[int]) -> int:
    """What the simulated model gives after `prefix`: a function of the request's seed and the tokens alone."""
    draw = random.Random(f"{request.seed} {prefix}").randrange(25)
    return END if draw == 0 else 1 + draw % 4


def run_alone(request: Request) -> list[int]:
    """The answer of a request that has the machine to itself, token by token."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) < len(request.prompt_token_ids) + request.max_tokens and (
        tokens[-1] != END or len(tokens) == len(request.prompt_token_ids)
    ):
        tokens.append(next_token(request, tokens))
    return tokens[len(request.prompt_token_ids) :]


def digest_of(cache_key: str, prefix: tuple[int, ...], block_size: int) -> bytes:
    """The prefix cache's name for the block that ends `prefix`, written down a second time."""
    digest = sha256(b"K" + cache_key.encode()).digest()
    for start in range(0, len(prefix), block_size):
        rows = b"".join(token.to_bytes(8, "little") for token in prefix[start : start + block_size])
        digest = sha256(b"B" + digest + rows).digest()
    return digest


class SimulatedEngine:
    """`rows[block, row]` is (cache key, oldest weights that went into it, prefix up to and with the token)."""

    def __init__(
        self, num_blocks: int, block_size: int, caching: bool, max_num_seqs: int, budget: int, max_model_len: int
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget, max_model_len)
        self.requests: dict[int, Request] = {}  # unfinished, in the order of arrival
        self.rows: dict[tuple[int, int], tuple[str, int, tuple[int, ...]]] = {}
        self.weights = 0
        self.admitted: dict[int, int] = {}  # id -> the prefix hit with which the request first ran
        self.preemptions: dict[int, int] = {}  # id -> how often the request was preempted
        self.next_id = 0
        self.drafts_accepted = 0

    def add(self, prompt: list[int], max_tokens: int | None, cache_key: str = "", seed: int = 0) -> Request:
        """InputError where the scheduler refuses."""
        request = Request(self.next_id, prompt, SamplingParams(max_tokens=max_tokens, cache_key=cache_key), seed)
        self.scheduler.add(request)
        self.next_id += 1
        self.requests[request.request_id] = request
        return request

    def abort(self, request_id: int) -> None:
        expected = self.requests.pop(request_id, None)
        available = self.blocks.num_available
        own = [] if expected is None else [b for b in expected.block_table if self._holders(b) == 0]
        assert self.scheduler.abort(request_id) is expected
        assert self.blocks.num_available == available + len(own)
        if expected is not None:
            assert expected.finish_reason == "abort"
            assert expected.block_table == []

    def change_weights(self) -> None:
        self.weights += 1
        self.blocks.reset_prefix_cache()
        assert self.blocks.num_cached == 0

    def start_step(self) -> list[ScheduledSequence]:
        """Schedule, check the step against every rule, and let the model write its rows."""
        scheduler, blocks = self.scheduler, self.blocks
        was_running = [r for r in self.requests.values() if r.state is RequestState.RUNNING]
        missing = sum(len(r.block_table) * blocks.block_size < r.num_tokens for r in was_running)
        enough = missing <= blocks.num_available
        asked = {r.request_id: len(r.draft_token_ids) for r in was_running}
        schedule = scheduler.schedule()
        scheduled = schedule.scheduled
        running = [r for r in self.requests.values() if r.state is RequestState.RUNNING]

        # Nobody starves: there is work, the first to arrive takes part, nobody is overtaken.
        assert bool(scheduled) == bool(self.requests)
        if scheduled:
            assert scheduled[0].request is next(iter(self.requests.values()))
        assert running == list(self.requests.values())[: len(running)]
        ids = [s.request.request_id for s in scheduled]
        assert ids == sorted(set(ids))
        # Limits.
        assert len(running) <= scheduler.max_num_seqs
        assert schedule.num_tokens <= scheduler.max_num_batched_tokens
        # Preemption takes the last, and only for want of blocks; never for drafts.
        assert not (enough and schedule.preempted)
        assert schedule.preempted == was_running[len(was_running) - len(schedule.preempted) :][::-1]
        for request in schedule.preempted:
            self.preemptions[request.request_id] = self.preemptions.get(request.request_id, 0) + 1
            assert request.block_table == []
            assert request.num_computed_tokens == 0
            assert request.state is RequestState.WAITING
            assert request.draft_token_ids == []
        for request in self.requests.values():
            assert request.num_preemptions == self.preemptions.get(request.request_id, 0)

        newcomers = [s for s in scheduled if s.request not in was_running]
        written = [b for s in scheduled for b in self._written_blocks(s)]
        assert len(written) == len(set(written))
        for sequence in scheduled:
            for block in self._written_blocks(sequence):  # one writer, and no reader but who starts in this step
                readers = [r for r in running if block in r.block_table and r is not sequence.request]
                assert all(any(s.request is reader for s in newcomers) for reader in readers)
        if blocks.enable_prefix_caching:
            self._check_sharing(newcomers)
        for sequence in scheduled:  # what one shares, one before it has written
            self._check_sequence(sequence, asked.get(sequence.request.request_id, 0))
            self._write(sequence)
        return scheduled

    def fail_step(self) -> None:
        """A step that the model does not finish."""
        was_running = [r for r in self.requests.values() if r.state is RequestState.RUNNING]
        preempted = self.scheduler.schedule().preempted
        started = [r for r in self.requests.values() if r.state is RequestState.RUNNING]
        self.scheduler.restart()
        for request in {id(r): r for r in [*was_running, *started]}.values():
            assert request.state is RequestState.WAITING
        for request in [*preempted, *started]:
            self.preemptions[request.request_id] = self.preemptions.get(request.request_id, 0) + 1
        for request in started:
            self.admitted.setdefault(request.request_id, request.num_cached_tokens)
        assert self.blocks.num_available == self.blocks.num_blocks
        assert self.blocks.num_cached == 0
        for place in self.rows:
            self.rows[place] = ("garbage", -1, ())

    def end_step(self, scheduled: list[ScheduledSequence]) -> None:
        """Verify drafts, hand the new tokens to the scheduler, finish what is done."""
        for sequence in scheduled:
            request = sequence.request
            if request.state is not RequestState.RUNNING:  # aborted meanwhile
                before = list(request.token_ids)
                self.scheduler.advance(sequence, [1] if sequence.samples else [])
                assert request.token_ids == before
                continue
            new = self._sample(sequence) if sequence.samples else []
            self.drafts_accepted += max(len(new) - 1, 0)
            self.scheduler.advance(sequence, new)
            assert request.draft_token_ids == [] or not sequence.samples
            assert request.num_computed_tokens == sequence.start + sequence.count - sequence.num_drafts + max(len(new) - 1, 0)
            assert request.num_cached_tokens == self.admitted[request.request_id]
            if new and new[-1] == END:
                self._finish(request, "stop")
            elif len(request.output_token_ids) == request.max_tokens:
                self._finish(request, "length")

    def step(self) -> None:
        self.end_step(self.start_step())
        self.check()

    def check(self) -> None:
        """Each block is in one place; what is shared or known holds what it must hold."""
        blocks, size = self.blocks, self.blocks.block_size
        used = {b for r in self.requests.values() for b in r.block_table}
        free, cached = set(blocks._free), set(blocks._cached)
        assert len(free) == len(blocks._free)
        assert len(used) + len(free) + len(cached) == blocks.num_blocks
        assert used | free | cached == set(range(blocks.num_blocks))
        for block in range(blocks.num_blocks):
            assert blocks._holders[block] == self._holders(block)
        for request in self.requests.values():
            assert (request.state is RequestState.RUNNING) == bool(request.block_table)
            for index, block in enumerate(request.block_table):
                if self._holders(block) > 1:
                    assert (index + 1) * size <= request.num_computed_tokens
            for position in range(request.num_computed_tokens):
                self._check_row(request, position)
        # What is known: of the present weights, under its own name, and with all that comes before it.
        assert set(blocks._registered.values()) >= cached
        known = set()
        for digest, block in blocks._registered.items():
            assert block not in free
            assert blocks._digests[block] == digest
            cache_key, weights, prefix = self.rows[block, size - 1]
            assert weights == self.weights
            assert digest == digest_of(cache_key, prefix, size)
            for row in range(size):
                assert self.rows[block, row] == (cache_key, weights, prefix[: len(prefix) - size + row + 1])
            known.add((cache_key, prefix))
        assert all(len(prefix) == size or (key, prefix[:-size]) in known for key, prefix in known)
        assert sum(digest is not None for digest in blocks._digests) == len(blocks._registered)

    def run_to_the_end(self) -> None:
        """Every request ends within as many steps as there are tokens left to compute if only the first one ever advances."""
        bound = sum(len(r.prompt_token_ids) + r.max_tokens for r in self.requests.values())
        for _ in range(bound):
            if not self.requests:
                break
            self.step()
        assert not self.requests
        assert not self.scheduler.has_unfinished
        assert self.blocks.num_available == self.blocks.num_blocks

    def _finish(self, request: Request, reason: str) -> None:
        assert request.output_token_ids == run_alone(request)
        self.scheduler.finish(request, reason)
        assert request.state is RequestState.FINISHED
        assert request.finish_reason == reason
        del self.requests[request.request_id]

    def _sample(self, sequence: ScheduledSequence) -> list[int]:
        request, new = sequence.request, []
        drafts = request.draft_token_ids[: sequence.num_drafts]
        for draft in [*drafts, None]:
            new.append(next_token(request, request.token_ids + new))
            if new[-1] != draft or new[-1] == END:
                break
        return new

    def _check_sharing(self, newcomers: list[ScheduledSequence]) -> None:
        """Of those that start together, none computes a whole block that one before it computes."""
        size, computed = self.blocks.block_size, set[tuple[str, tuple[int, ...]]]()
        for sequence in newcomers:
            request = sequence.request
            limit = (request.num_tokens - 1) // size  # one token is computed in any case
            ends = range(sequence.start + size, sequence.start + sequence.count + 1, size)
            own = {(request.params.cache_key, tuple(request.token_ids[:end])) for end in ends if end <= limit * size}
            assert not own & computed
            computed |= {(request.params.cache_key, tuple(request.token_ids[:end])) for end in ends}

    def _check_sequence(self, sequence: ScheduledSequence, asked: int) -> None:
        request, size = sequence.request, self.blocks.block_size
        assert sequence.start == request.num_computed_tokens
        assert sequence.count - sequence.num_drafts >= 1  # a wholly cached prompt still computes a token
        assert 0 <= sequence.num_drafts <= asked
        end = sequence.start + sequence.count
        assert sequence.samples == (end - sequence.num_drafts == request.num_tokens)
        assert sequence.samples or sequence.num_drafts == 0
        assert end <= len(request.block_table) * size
        assert len(request.output_token_ids) + sequence.num_drafts + 1 <= request.max_tokens
        assert len(request.prompt_token_ids) + request.max_tokens <= self.scheduler.max_model_len
        assert len(sequence.token_ids) == sequence.count
        if request.request_id not in self.admitted:
            assert sequence.start % size == 0
            self.admitted[request.request_id] = sequence.start
        for position in range(sequence.start):
            self._check_row(request, position)

    def _check_row(self, request: Request, position: int) -> None:
        size = self.blocks.block_size
        cache_key, _, prefix = self.rows[request.block_table[position // size], position % size]
        assert cache_key == request.params.cache_key
        assert prefix == tuple(request.token_ids[: position + 1])

    def _written_blocks(self, sequence: ScheduledSequence) -> list[int]:
        size, end = self.blocks.block_size, sequence.start + sequence.count
        return sequence.request.block_table[sequence.start // size : -(-end // size)]

    def _write(self, sequence: ScheduledSequence) -> None:
        request, size = sequence.request, self.blocks.block_size
        tokens = request.token_ids[: sequence.start] + sequence.token_ids
        oldest = self.weights
        if sequence.start:
            last = sequence.start - 1
            oldest = self.rows[request.block_table[last // size], last % size][1]
        for position in range(sequence.start, sequence.start + sequence.count):
            place = request.block_table[position // size], position % size
            self.rows[place] = (request.params.cache_key, oldest, tuple(tokens[: position + 1]))

    def _holders(self, block: int) -> int:
        return sum(block in r.block_table for r in self.requests.values())
