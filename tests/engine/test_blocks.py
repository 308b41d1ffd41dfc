"""The block pool beside a naive model of it: same hits, same evictions, same counts, for any order of operations."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finback.config import InputError
from finback.engine.blocks import BlockManager
from finback.engine.config import SamplingParams
from finback.engine.request import Request
from tests.engine.simulated import digest_of

Prefix = tuple[str, tuple[int, ...]]  # cache key, and all tokens up to the end of a block


class NaivePool:
    """What the pool must do, by prefixes instead of digests and by search instead of order. Knows no block numbers."""

    def __init__(self, num_blocks: int, size: int, caching: bool) -> None:
        self.num_blocks, self.size, self.caching = num_blocks, size, caching
        self.released: dict[Prefix, int] = {}  # known prefix -> when its last holder left; meaningless while somebody holds it
        self.known_of: dict[int, list[Prefix]] = {}  # request -> known prefixes that it holds
        self.private_of: dict[int, int] = {}  # request -> blocks of its own that nobody knows
        self.clock = 0

    def holders(self, prefix: Prefix) -> int:
        return sum(prefix in known for known in self.known_of.values())

    def cached(self) -> list[Prefix]:
        return [prefix for prefix in self.released if not self.holders(prefix)]

    def used(self) -> int:
        return len({p for known in self.known_of.values() for p in known}) + sum(self.private_of.values())

    def prefixes(self, request: Request) -> Iterator[Prefix]:
        for end in range(self.size, request.num_tokens + 1, self.size):
            yield request.params.cache_key, tuple(request.token_ids[:end])

    def admit(self, request: Request) -> bool:
        hits: list[Prefix] = []
        for prefix in self.prefixes(request):
            if prefix not in self.released or len(prefix[1]) >= request.num_tokens:
                break
            hits.append(prefix)
        needed = -(-request.num_tokens // self.size) - len(hits)
        if needed > self.num_blocks - self.used() - sum(not self.holders(hit) for hit in hits):
            return False
        self.known_of[request.request_id] = hits
        self.private_of[request.request_id] = 0
        self.take(request, needed)
        return True

    def take(self, request: Request, number: int) -> None:
        for _ in range(number):
            if self.used() + len(self.cached()) == self.num_blocks:
                # The least recently released; of those released together, the one furthest from its chain's head.
                del self.released[min(self.cached(), key=lambda p: (self.released[p], -len(p[1])))]
            self.private_of[request.request_id] += 1

    def commit(self, request: Request, stale: bool) -> None:
        known = self.known_of[request.request_id]
        if self.caching and not stale:
            for prefix in list(self.prefixes(request))[len(known) :]:
                if len(prefix[1]) > request.num_computed_tokens:
                    break
                self.released.setdefault(prefix, self.clock)
                known.append(prefix)
                self.private_of[request.request_id] -= 1
        extra = len(known) + self.private_of[request.request_id] - max(-(-request.num_tokens // self.size), 1)
        self.private_of[request.request_id] -= max(extra, 0)

    def release(self, request: Request) -> None:
        self.clock += 1
        del self.private_of[request.request_id]
        for prefix in self.known_of.pop(request.request_id):
            if not self.holders(prefix):
                self.released[prefix] = self.clock

    def reset(self) -> None:
        for request_id, known in self.known_of.items():
            self.private_of[request_id] += len(known)
            known.clear()
        self.released.clear()


class PoolMachine(RuleBasedStateMachine):
    """One pool and its naive model, driven without a scheduler."""

    @initialize(num_blocks=st.integers(1, 10), size=st.integers(1, 4), caching=st.sampled_from([True, True, True, False]))
    def start(self, num_blocks: int, size: int, caching: bool) -> None:
        self.pool = BlockManager(num_blocks, size, caching)
        self.naive = NaivePool(num_blocks, size, caching)
        self.requests: dict[int, Request] = {}
        self.stale: set[int] = set()
        self.next_id = 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=4),
        repeat=st.integers(1, 5),
        cache_key=st.sampled_from(["", "", "", "other"]),
    )
    def admit(self, prompt: list[int], repeat: int, cache_key: str) -> None:
        request = Request(self.next_id, prompt * repeat, SamplingParams(cache_key=cache_key))
        self.next_id += 1
        before = list(request.block_table), self.pool.num_used, list(self.pool._cached)
        admitted = self.pool.admit(request)
        assert admitted == self.naive.admit(request)
        if admitted:
            self.requests[request.request_id] = request
            hits = len(self.naive.known_of[request.request_id])
            assert request.num_computed_tokens == hits * self.pool.block_size
        else:
            assert (list(request.block_table), self.pool.num_used, list(self.pool._cached)) == before

    @precondition(lambda self: getattr(self, "requests", None))
    @rule(pick=st.integers(0, 9), tokens=st.integers(1, 6), new=st.lists(st.integers(1, 2), max_size=3), ahead=st.integers(0, 3))
    def compute(self, pick: int, tokens: int, new: list[int], ahead: int) -> None:
        """Some of the request's tokens are computed; if all, its answer grows. Before that it took blocks for `ahead` drafts."""
        request = list(self.requests.values())[pick % len(self.requests)]
        end = min(request.num_computed_tokens + tokens, request.num_tokens)
        new = new if end == request.num_tokens else []
        for _ in range(-(-(request.num_tokens + ahead) // self.pool.block_size) - len(request.block_table)):
            if self.pool.num_available:
                self.pool.grow(request, 1)
                self.naive.take(request, 1)
        if request.num_tokens > len(request.block_table) * self.pool.block_size:
            return  # no block for the row: a scheduler would preempt somebody
        request.append(new)
        request.num_computed_tokens = end
        self.pool.commit(request)
        self.naive.commit(request, request.request_id in self.stale)

    @precondition(lambda self: getattr(self, "requests", None))
    @rule(pick=st.integers(0, 9))
    def release(self, pick: int) -> None:
        request = self.requests.pop(list(self.requests)[pick % len(self.requests)])
        self.pool.release(request)
        self.naive.release(request)
        assert (request.block_table, request.num_computed_tokens) == ([], 0)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        self.naive.reset()
        self.stale |= set(self.requests)

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, naive = self.pool, self.naive
        assert pool.num_used == naive.used()
        assert pool.num_cached == len(naive.cached())
        assert pool.num_available == pool.num_blocks - naive.used()
        assert set(pool._registered) == {digest_of(key, tokens, pool.block_size) for key, tokens in naive.released}
        # No child without its parent, so that what is evicted first is a tail.
        assert all(
            len(tokens) == pool.block_size or (key, tokens[: -pool.block_size]) in naive.released
            for key, tokens in naive.released
        )

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for request in self.requests.values():
                self.pool.release(request)
            assert self.pool.num_available == self.pool.num_blocks
            assert sorted([*self.pool._free, *self.pool._cached]) == list(range(self.pool.num_blocks))


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30)
TestBesideTheNaivePool = PoolMachine.TestCase


@pytest.mark.slow
class TestBesideTheNaivePoolLong(PoolMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=3000, stateful_step_count=80)


def compute(pool: BlockManager, tokens: list[int], cache_key: str = "") -> Request:
    """A request whose tokens are all computed."""
    request = Request(0, tokens, SamplingParams(cache_key=cache_key))
    assert pool.admit(request)
    request.num_computed_tokens = len(tokens)
    pool.commit(request)
    return request


def hit(pool: BlockManager, tokens: list[int], cache_key: str = "") -> int:
    """Tokens of a cached prefix that a request with these tokens finds, without a trace but in the order of eviction."""
    request = Request(0, tokens, SamplingParams(cache_key=cache_key))
    assert pool.admit(request)
    tokens_found = request.num_computed_tokens
    pool.release(request)
    return tokens_found


def test_hits_are_whole_blocks_of_equal_tokens_under_the_same_key() -> None:
    pool = BlockManager(32, block_size=4)
    pool.release(compute(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    for tokens, expected in [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 8),
        ([1, 2, 3, 4, 5, 6, 7, 8], 4),  # at least one token is computed, and hits are whole blocks
        ([1, 2, 3, 4, 5, 6, 7], 4),
        ([1, 2, 3, 4], 0),
        ([1, 2, 3, 5, 5, 6, 7, 8, 9], 0),
        ([5, 6, 7, 8, 9], 0),  # a block is known by all that comes before it
        ([1, 2, 3, 4, 5, 6, 7, 9, 9], 4),
    ]:
        assert hit(pool, tokens) == expected, tokens
    assert hit(pool, [1, 2, 3, 4, 5], cache_key="other") == 0


def test_a_key_cannot_pose_as_a_chain() -> None:
    """A key may hold any characters, even the bytes of another key's digest and tokens, or halves of surrogate pairs."""
    pool = BlockManager(32, block_size=1)
    for cache_key in ("", "\0", "a", "\ud800", "B" + "x" * 32):
        request = compute(pool, [1, 2, 3], cache_key)
        assert request.num_registered_blocks == 3
        pool.release(request)
    assert len(pool._registered) == 15


def test_without_prefix_caching_nothing_is_kept_or_hashed() -> None:
    pool = BlockManager(8, block_size=2, enable_prefix_caching=False)
    request = compute(pool, [1] * 8)
    pool.release(request)
    assert pool.num_cached == 0
    assert request.block_hashes == []
    assert hit(pool, [1] * 8) == 0


def test_tails_are_evicted_before_heads_and_old_chains_before_new_ones() -> None:
    pool = BlockManager(6, block_size=2)
    old, new = compute(pool, [1] * 6), compute(pool, [2] * 6)
    pool.release(old)
    pool.release(new)
    taken = Request(9, [3], SamplingParams())
    assert pool.admit(taken)
    left = []
    for _ in range(5):
        # Asked by digest: a real admission would change the order.
        known = [sum(digest_of("", (token,) * 2 * n, 2) in pool._registered for n in (1, 2, 3)) for token in (1, 2)]
        left.append(known)
        pool.grow(taken, 1)
    assert left == [[2, 3], [1, 3], [0, 3], [0, 2], [0, 1]]
    assert pool.num_available == 0


def test_a_hit_makes_a_chain_young_again() -> None:
    pool = BlockManager(4, block_size=2)
    pool.release(compute(pool, [1] * 2))
    pool.release(compute(pool, [2] * 2))
    assert hit(pool, [1] * 3) == 2
    taken = Request(9, [3] * 5, SamplingParams())
    assert pool.admit(taken)  # three blocks: two free ones and the oldest cached
    assert digest_of("", (1, 1), 2) in pool._registered
    assert digest_of("", (2, 2), 2) not in pool._registered


def test_the_later_of_two_equal_blocks_is_exchanged_for_the_known_one() -> None:
    pool = BlockManager(8, block_size=2)
    requests = [Request(number, [1, 1, 1, 1, number], SamplingParams()) for number in (5, 6)]
    for request in requests:
        assert pool.admit(request)
    first, second = requests
    assert not set(first.block_table) & set(second.block_table)
    for request in requests:
        request.num_computed_tokens = 5
        pool.commit(request)
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    assert pool.num_used == 4
    pool.release(first)
    assert pool.num_used == 3
    pool.release(second)
    assert (pool.num_used, pool.num_cached) == (0, 2)


def test_admission_counts_cached_hits_as_taken() -> None:
    """A hit that nobody holds is no longer free for the rest of the same request."""
    pool = BlockManager(3, block_size=2)
    pool.release(compute(pool, [1] * 4))  # two cached, one free
    request = Request(1, [1] * 4 + [2] * 3, SamplingParams())  # two hits and two new ones
    assert not pool.admit(request)
    assert (pool.num_used, pool.num_cached, request.block_table) == (0, 2, [])
    shorter = Request(2, [1] * 4 + [2] * 2, SamplingParams())
    assert pool.admit(shorter)
    assert pool.num_used == 3


def test_after_a_reset_nothing_old_is_found_or_registered() -> None:
    pool = BlockManager(16, block_size=2)
    pool.release(compute(pool, [9] * 4))
    running = compute(pool, [1] * 4)
    pool.reset_prefix_cache()
    assert hit(pool, [9] * 5) == 0
    assert hit(pool, [1] * 5) == 0
    running.append([1, 1])
    pool.grow(running, 1)
    running.num_computed_tokens = 6  # computed with new weights, but from rows of the old ones
    pool.commit(running)
    assert hit(pool, [1] * 7) == 0
    fresh = compute(pool, [1] * 4)
    assert not set(fresh.block_table) & set(running.block_table)
    pool.release(running)
    assert pool.num_cached == 0
    pool.release(fresh)
    assert hit(pool, [1] * 5) == 4
    assert pool.admit(running)  # anew, as after a preemption
    assert running.num_computed_tokens == 4
    running.num_computed_tokens = 6
    pool.commit(running)
    pool.release(running)
    assert hit(pool, [1] * 7) == 6


def test_a_prompt_is_hashed_once_however_often_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = BlockManager(8, block_size=2)
    holder = compute(pool, [2] * 10)
    waiting = Request(1, [1] * 16, SamplingParams())
    hashed = []
    hashes = BlockManager._hashes

    def counting(pool: BlockManager, request: Request, num_blocks: int) -> list[bytes]:
        before = len(request.block_hashes)
        result = hashes(pool, request, num_blocks)
        hashed.append(len(result) - before)
        return result

    monkeypatch.setattr(BlockManager, "_hashes", counting)
    for _ in range(5):
        assert not pool.admit(waiting)
    pool.release(holder)
    assert pool.admit(waiting)
    assert hashed == [7, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_blocks": 0}, "field num_blocks is 0, it must be a whole number of at least 1"),
        ({"num_blocks": True}, "field num_blocks is True"),
        ({"num_blocks": 4, "block_size": -1}, "field block_size is -1, it must be a whole number of at least 1"),
    ],
)
def test_sizes_below_one_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BlockManager(**values)
