"""Which tokens of which requests the next step computes. Integers only, no torch.

A step has one budget of tokens. Running requests come first, in the order of their arrival: one token each where they decode, a chunk
of their prompt where they still prefill. Then draft tokens, where budget and blocks are left. Then waiting requests in the order of
their arrival; the first that does not fit holds back those behind it, so that nobody is overtaken for ever.

A request gets the blocks of all its tokens when it starts, and one more whenever it has filled them. When none is left, the request
that arrived last is preempted: its blocks go back, and later it computes its prompt and its answer so far again, from the prefix
cache where that still has them. Requests that start in one step share the whole blocks of a common prefix: the first computes them
for all. The request that arrived first is never preempted and makes progress in every step, so every request
ends.
"""

from collections import OrderedDict
from dataclasses import dataclass

from finback.config import InputError
from finback.engine.blocks import BlockManager
from finback.engine.config import is_integer
from finback.engine.request import FinishReason, Request, RequestState

LARGEST_TOKEN_ID = 2**31 - 1


class ScheduledSequence:
    """The tokens of one request in a step: positions `start` to `start + count - 1`, the last `num_drafts` of them draft tokens.

    `samples` tells whether they reach the end of the request's tokens, so that the step yields a new one.
    """

    __slots__ = ("count", "num_drafts", "request", "samples", "start")

    def __init__(self, request: Request, start: int, count: int, samples: bool) -> None:
        self.request = request
        self.start = start
        self.count = count
        self.num_drafts = 0
        self.samples = samples

    @property
    def token_ids(self) -> list[int]:
        """The tokens that the step computes, drafts included; to be read before `advance`."""
        request = self.request
        tokens = request.token_ids[self.start : self.start + self.count - self.num_drafts]
        return tokens + request.draft_token_ids[: self.num_drafts]

    def __repr__(self) -> str:
        return f"ScheduledSequence({self.request!r}, {self.start}, {self.count}, {self.num_drafts}, {self.samples})"


class Schedule:
    """One step: what is computed, and which requests were preempted to make room for it."""

    __slots__ = ("preempted", "scheduled")

    def __init__(self, scheduled: list[ScheduledSequence], preempted: list[Request]) -> None:
        self.scheduled = scheduled
        self.preempted = preempted

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(sequence.count for sequence in self.scheduled)


@dataclass(frozen=True)
class SchedulerStats:
    """What a metrics page shows. Blocks are used, cached or free; tokens and preemptions are counted since the start."""

    num_running: int
    num_waiting: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    prefix_query_tokens: int  # tokens of prompts that ran
    prefix_hit_tokens: int  # those of them that were found in the prefix cache
    num_preemptions: int


class Scheduler:
    """Continuous batching over one `BlockManager`. Not for several threads. Raises InputError for sizes below 1.

    Each step: `schedule`, run the model, `advance` every scheduled sequence, `finish` those requests that are done. `add` and `abort`
    may come at any time between these calls, but that after `schedule` the model must run: if it fails, call `restart`.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> None:
        sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "max_model_len": max_model_len}
        for name, value in sizes.items():
            if not is_integer(value) or value < 1:
                raise InputError(f"field {name} is {value!r}, it must be a whole number of at least 1")
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        # Both by id, in the order of arrival; everything that runs arrived before everything that waits.
        self._running: dict[int, Request] = {}
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._prefix_query_tokens = 0
        self._prefix_hit_tokens = 0
        self._num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request runs or waits; if so, the next `schedule` has something to compute."""
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> None:
        """Let a new request wait for its turn. Sets its `max_tokens` to what context and cache leave room for.

        InputError where it can never run: no tokens, no token ids, no room in the context, or more blocks than there are.
        """
        assert request.state is RequestState.WAITING
        assert request.request_id not in self._running
        assert request.request_id not in self._waiting
        request.max_tokens = self._resolve_max_tokens(request)
        self._waiting[request.request_id] = request

    def abort(self, request_id: int) -> Request | None:
        """End a request in whatever state, its blocks free at once; None if it has ended already or never was."""
        request = self._running.get(request_id) or self._waiting.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request that runs or waits. Its blocks go back; what the prefix cache knows of them stays until it is overwritten."""
        if request.state is RequestState.RUNNING:
            del self._running[request.request_id]
        else:
            del self._waiting[request.request_id]
        self.blocks.release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.draft_token_ids = []

    def schedule(self) -> Schedule:
        """The next step, its blocks already in the requests' tables. Empty only if there is nothing unfinished."""
        running, preempted = list(self._running.values()), list[Request]()
        scheduled = list[ScheduledSequence]()
        budget, drafts = self.max_num_batched_tokens, False
        # Each was admitted while budget was left, and only the last one admitted can need more than one token: all of them get some.
        for request in running:
            if request.state is not RequestState.RUNNING:
                break  # preempted by one before it, like all those behind it
            start, remaining = request.num_computed_tokens, len(request.token_ids) - request.num_computed_tokens
            if len(request.block_table) * self.blocks.block_size < start + remaining and not self._grow(request, preempted):
                break
            count = remaining if remaining <= budget else budget
            scheduled.append(ScheduledSequence(request, start, count, count == remaining))
            budget -= count
            drafts = drafts or bool(request.draft_token_ids)
        if drafts:
            budget = self._add_drafts(scheduled, budget)
        if self._waiting:
            for sequence in scheduled:
                self._announce(sequence)
            self._admit(scheduled, budget)
        return Schedule(scheduled, preempted)

    def advance(self, sequence: ScheduledSequence, new_token_ids: list[int]) -> None:
        """Note that the model computed `sequence`: append the tokens that it gave, and settle the blocks.

        `new_token_ids` are the accepted drafts and the token after them, or their beginning where the answer ends inside; none if the
        sequence does not sample. The request's drafts are used up: set new ones after this. A request that was aborted during the
        step is left alone.
        """
        request = sequence.request
        if request.state is not RequestState.RUNNING:
            return
        computed = sequence.start + sequence.count
        if sequence.samples:
            assert 1 <= len(new_token_ids) <= 1 + sequence.num_drafts
            computed += len(new_token_ids) - 1 - sequence.num_drafts
            request.append(new_token_ids)
            request.draft_token_ids = []
        else:
            assert not new_token_ids
        request.num_computed_tokens = computed
        self.blocks.commit(request)

    def restart(self) -> None:
        """After a step in which the model failed: nothing that the cache holds is trusted, and every request that runs starts over
        with its prompt and its answer so far."""
        while self._running:
            self._preempt_last()
        self.blocks.reset_prefix_cache()

    def stats(self) -> SchedulerStats:
        """Numbers for a metrics page."""
        blocks = self.blocks
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            blocks_used=blocks.num_used,
            blocks_cached=blocks.num_cached,
            blocks_free=blocks.num_available - blocks.num_cached,
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            num_preemptions=self._num_preemptions,
        )

    def _resolve_max_tokens(self, request: Request) -> int:
        prompt, size = request.prompt_token_ids, self.blocks.block_size
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if set(map(type, prompt)) != {int} or min(prompt) < 0 or max(prompt) > LARGEST_TOKEN_ID:
            wrong = next(token for token in prompt if type(token) is not int or not 0 <= token <= LARGEST_TOKEN_ID)
            raise InputError(f"the prompt holds {wrong!r}, which is no token id; give whole numbers of at least 0")
        length = len(prompt)
        if length + 1 > self.max_model_len:
            raise InputError(
                f"the prompt has {length} tokens, which leaves no room for an answer within max_model_len ({self.max_model_len});"
                f" shorten the prompt or raise max_model_len to {length + 1} or more, as far as the model allows"
            )
        # The last token of an answer is never computed, so it needs no room in the cache.
        room = self.blocks.num_blocks * size + 1 - length
        max_tokens = min(request.max_tokens, self.max_model_len - length)
        if request.params.max_tokens is None:
            max_tokens = min(max_tokens, max(room, 1))
        if max_tokens > room:
            needed = -(-(length + max_tokens - 1) // size)
            remedy = f"lower max_tokens to {room}" if room > 0 else "shorten the prompt"
            raise InputError(
                f"the prompt ({length} tokens) with max_tokens {max_tokens} needs {needed} cache blocks of {size} tokens, and there are"
                f" {self.blocks.num_blocks}; {remedy} or raise num_blocks to {needed} or more"
            )
        return max_tokens

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """One more block for a running request, if need be from those that arrived last; False if that is the request itself."""
        while self.blocks.num_available == 0:
            preempted.append(self._preempt_last())
            if preempted[-1] is request:
                return False
        self.blocks.grow(request, 1)
        return True

    def _preempt_last(self) -> Request:
        last_id, last = self._running.popitem()
        self.blocks.release(last)
        last.state = RequestState.WAITING
        last.draft_token_ids = []
        last.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting[last_id] = last
        self._waiting.move_to_end(last_id, last=False)
        return last

    def _add_drafts(self, scheduled: list[ScheduledSequence], budget: int) -> int:
        """Schedule draft tokens as far as they fit; returns the budget that is left. Drafts that do not fit are dropped."""
        size = self.blocks.block_size
        for sequence in scheduled:
            request = sequence.request
            if not request.draft_token_ids:
                continue
            table, end = request.block_table, sequence.start + sequence.count
            places = (len(table) + self.blocks.num_available) * size - end
            answer = request.max_tokens - len(request.output_token_ids) - 1  # the step yields one token besides
            number = min(len(request.draft_token_ids), budget, places, answer)  # 0 if it does not sample: it took all the budget
            del request.draft_token_ids[number:]
            missing = -(-(end + number) // size) - len(table)
            if missing > 0:
                self.blocks.grow(request, missing)
            sequence.num_drafts = number
            sequence.count += number
            budget -= number
        return budget

    def _admit(self, scheduled: list[ScheduledSequence], budget: int) -> None:
        """Start waiting requests while slots, budget and blocks last."""
        while self._waiting and budget > 0 and len(self._running) < self.max_num_seqs:
            request_id, request = next(iter(self._waiting.items()))
            if not self.blocks.admit(request):
                return
            del self._waiting[request_id]
            self._running[request_id] = request
            request.state = RequestState.RUNNING
            if request.num_preemptions == 0:
                request.num_cached_tokens = request.num_computed_tokens
                self._prefix_query_tokens += len(request.token_ids)
                self._prefix_hit_tokens += request.num_computed_tokens
            start = request.num_computed_tokens
            remaining = len(request.token_ids) - start
            count = min(remaining, budget)
            scheduled.append(ScheduledSequence(request, start, count, count == remaining))
            self._announce(scheduled[-1])
            budget -= count

    def _announce(self, sequence: ScheduledSequence) -> None:
        """Let those that start in this step share what `sequence` computes; drafts may turn out to be wrong."""
        self.blocks.announce(sequence.request, sequence.start + sequence.count - sequence.num_drafts)
