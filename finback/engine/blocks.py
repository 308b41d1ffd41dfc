"""The pool of cache blocks: who holds which, and which prefixes they keep for later. Integers only, no torch.

A block is in one of three states. *Free*: it holds nothing of value. *Used*: one or more requests hold it (`_holders` counts them).
*Cached*: nobody holds it, but its content is a known prefix; it is taken again by a request with that prefix, or overwritten when
no block is free, the least recently released first.

The prefix cache knows full blocks only, under a digest of everything that their content depends on: the request's `cache_key` and all
tokens up to the block's end, as SHA-256 over (digest of the block before, the block's token ids). Equal digests are taken for equal
tokens; a collision that somebody could make is one of SHA-256 itself.

Two rules keep it simple:

- A registered block is written in the step that registers it or never again, and a request registers or adopts blocks strictly from
  the front. So whoever holds a registered block holds all blocks before it, too. The cache therefore never knows a block without its
  predecessors, the length of a hit can be found by bisection, and releasing a request's blocks from its tail makes every chain's
  tail older than its head: plain least-recently-used eviction takes tails first.
- A block may be registered by the step that computes it, before it has run (`announce`): the model writes a layer's rows for all
  tokens of a step before any of them attends, so a request that starts in this very step can already adopt the block. Two requests
  that run and come to the same block at once both write a copy of their own. The first to finish it registers it; the other then
  adopts the registered block and gives its copy back. So an entry of a running request's `block_table` may change between two steps,
  always to a block of the same content.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

from finback.config import InputError
from finback.engine.config import is_integer
from finback.engine.request import Request


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens. Raises InputError for sizes below 1.

    Each operation takes time in proportion to the blocks that it hands over, and to the logarithm of a prompt's length in blocks; a
    prompt is hashed once, a token of the answer once.
    """

    def __init__(self, num_blocks: int, block_size: int = 64, enable_prefix_caching: bool = True) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if not is_integer(value) or value < 1:
                raise InputError(f"field {name} is {value!r}, it must be a whole number of at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block last given back is the likeliest in the CPU's cache
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._holders = [0] * num_blocks
        self._registered: dict[bytes, int] = {}  # digest -> the one block with that content
        self._digests: list[bytes | None] = [None] * num_blocks  # the inverse
        self._epoch = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free ones, and cached ones that would be overwritten."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content is kept."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - self.num_available

    def is_used(self, block: int) -> bool:
        """Whether any request holds the block."""
        return self._holders[block] > 0

    def admit(self, request: Request) -> bool:
        """Give a request without blocks all that its tokens need, cached prefix first; False, and nothing done, if they do not fit.

        `num_computed_tokens` becomes the length of the hit: whole blocks, and always less than the request's tokens, so that at least
        one is computed and yields logits.
        """
        size = self.block_size
        table = request.block_table
        hits = self._find_hits(request)
        num_new = -(-len(request.token_ids) // size) - len(hits)
        # Whoever holds a block holds those before it: the hits without a holder are the last ones.
        num_held = bisect_left(hits, True, key=lambda block: self._holders[block] == 0)
        if num_new > self.num_available - (len(hits) - num_held):
            return False
        for block in hits:
            self._holders[block] += 1
        for block in hits[num_held:]:
            del self._cached[block]
        table += hits
        self._take(table, num_new)
        request.num_registered_blocks = len(hits)
        request.num_computed_tokens = len(hits) * size
        request.cache_epoch = self._epoch
        return True

    def grow(self, request: Request, num_blocks: int) -> None:
        """Append `num_blocks` blocks, of which there must be as many available."""
        self._take(request.block_table, num_blocks)

    def announce(self, request: Request, num_tokens: int) -> None:
        """Make known the full blocks among the first `num_tokens` tokens, all of which the step that is being put together computes.

        Requests that are admitted after this and have the same prefix hold them, too; so the step must run, or the prefix cache be
        reset.
        """
        first, end = request.num_registered_blocks, num_tokens // self.block_size
        if end <= first or not self.enable_prefix_caching or request.cache_epoch != self._epoch:
            return
        hashes = self._hashes(request, end)
        for index in range(first, end):
            if hashes[index] in self._registered:
                return  # somebody else's: `commit` exchanges them when this one is written
            block = request.block_table[index]
            self._registered[hashes[index]] = block
            self._digests[block] = hashes[index]
            request.num_registered_blocks += 1

    def commit(self, request: Request) -> None:
        """After a step: make known the full blocks of computed tokens, and take back blocks beyond the request's tokens.

        The latter were taken for draft tokens that were not accepted.
        """
        size, table, computed = self.block_size, request.block_table, request.num_computed_tokens
        if (
            computed >= (request.num_registered_blocks + 1) * size
            and self.enable_prefix_caching
            and request.cache_epoch == self._epoch
        ):
            self._register(request, computed // size)
        while (len(table) - 1) * size >= len(request.token_ids):
            block = table.pop()
            self._holders[block] = 0
            self._free.append(block)

    def release(self, request: Request) -> None:
        """Take back all of a request's blocks, tail first. Content that the prefix cache knows stays until it is overwritten."""
        holders = self._holders
        for block in reversed(request.block_table):
            holders[block] -= 1
            if holders[block] == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        request.block_table.clear()
        request.num_computed_tokens = 0

    def reset_prefix_cache(self) -> None:
        """Forget all content, as after a change of the weights.

        Running requests keep their blocks and go on. Nothing that they compute becomes known until they are admitted anew: it follows
        from rows of the old weights.
        """
        self._epoch += 1
        for block in self._registered.values():
            self._digests[block] = None
        self._registered.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def kept(self) -> list[tuple[bytes, int]]:
        """Digest and number of every block that nobody holds and whose content is known, the least recently released first."""
        found = []
        for block in self._cached:
            digest = self._digests[block]
            assert digest is not None
            found.append((digest, block))
        return found

    def restore(self, digests: Sequence[bytes]) -> list[int]:
        """Take in contents that `kept` told, in its order, before any request; the blocks to write them to, for the last of `digests`
        where not all fit. The first to be dropped are tails, so that no block is known without those before it."""
        assert not self._registered
        assert self.num_used == 0
        blocks = []
        for digest in digests[-self.num_blocks :] if self.enable_prefix_caching else ():
            block = self._free.pop()
            self._registered[digest] = block
            self._digests[block] = digest
            self._cached[block] = None
            blocks.append(block)
        return blocks

    def _find_hits(self, request: Request) -> list[int]:
        """The longest cached prefix of whole blocks that leaves at least one token."""
        if not self._registered:
            return []
        limit = (len(request.token_ids) - 1) // self.block_size
        hashes, registered = self._hashes(request, limit), self._registered
        length = bisect_left(range(limit), True, key=lambda index: hashes[index] not in registered)
        return [registered[digest] for digest in hashes[:length]]

    def _register(self, request: Request, num_blocks: int) -> None:
        """Make the first `num_blocks` blocks known, or exchange each for the known one of the same content."""
        table, hashes = request.block_table, self._hashes(request, num_blocks)
        for index in range(request.num_registered_blocks, num_blocks):
            digest, own = hashes[index], table[index]
            known = self._registered.setdefault(digest, own)
            if known == own:
                self._digests[own] = digest
                continue
            if self._holders[known] == 0:
                del self._cached[known]
            self._holders[known] += 1
            table[index] = known
            self._holders[own] = 0
            self._free.append(own)
        request.num_registered_blocks = num_blocks

    def _hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """Digests of at least the first `num_blocks` blocks of the request's tokens, each computed once."""
        hashes, size, tokens = request.block_hashes, self.block_size, request.token_ids
        for index in range(len(hashes), num_blocks):
            # The leading byte keeps a key from posing as a chain.
            parent = hashes[-1] if hashes else sha256(b"K" + request.params.cache_key.encode("utf-8", "surrogatepass")).digest()
            hashes.append(sha256(b"B" + parent + array("q", tokens[index * size : (index + 1) * size]).tobytes()).digest())
        return hashes

    def _take(self, table: list[int], num_blocks: int) -> None:
        for _ in range(num_blocks):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                digest = self._digests[block]
                assert digest is not None
                del self._registered[digest]
                self._digests[block] = None
            self._holders[block] = 1
            table.append(block)
