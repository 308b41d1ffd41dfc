"""One request on its way through the engine. No torch; the scheduler and the block manager change it, the engine reads it."""

import secrets
from enum import Enum
from typing import Literal

from finback.engine.config import DEFAULT_MAX_TOKENS, SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestState(Enum):
    """WAITING holds no blocks (new, or preempted), RUNNING holds some, FINISHED has given them back for good."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """A prompt, its answer so far, and the cache blocks that hold both.

    Tokens are added by `append` only, so that `token_ids` (prompt and answer) and `output_token_ids` agree. `num_computed_tokens`
    counts the leading tokens whose cache rows are written; position p lies in block `block_table[p // block_size]`, row
    p % block_size. `max_tokens` is resolved when the scheduler takes the request.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "cache_epoch",
        "draft_token_ids",
        "finish_reason",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_registered_blocks",
        "output_token_ids",
        "params",
        "prompt_token_ids",
        "request_id",
        "seed",
        "state",
        "token_ids",
    )

    def __init__(self, request_id: int, prompt_token_ids: list[int], params: SamplingParams, seed: int | None = None) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_tokens = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
        if seed is None:
            seed = secrets.randbits(63) if params.seed is None else params.seed
        self.seed = seed
        self.token_ids = list(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.draft_token_ids: list[int] = []  # guesses at the next tokens, to be verified in the next step
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # tokens of the prompt found in the prefix cache when the request first ran
        self.num_preemptions = 0
        # The block manager's own notes.
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the full blocks of `token_ids`, as far as they were needed
        self.num_registered_blocks = 0  # leading blocks of the table that the prefix cache knows
        self.cache_epoch = 0  # the prefix cache's epoch in which the blocks were computed

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.token_ids)

    def append(self, token_ids: list[int]) -> None:
        """Add tokens to the answer."""
        self.output_token_ids += token_ids
        self.token_ids += token_ids

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.state.value}, {len(self.prompt_token_ids)}+{len(self.output_token_ids)} tokens,"
            f" {self.num_computed_tokens} computed, blocks {self.block_table})"
        )
