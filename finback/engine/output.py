"""What the engine gives back."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from finback.engine.request import FinishReason
from finback.engine.sampler import TokenLogprobs


class Increment(NamedTuple):
    """What one step added to one answer."""

    request_id: int
    text: str  # whole characters only; may be empty while one is incomplete or a stop string might be coming
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None  # of these tokens, where they were asked for
    finish_reason: FinishReason | None  # None until the last
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    error: str | None = None  # a sentence, where finish_reason is "error"
    experts: Tensor | None = None  # with the last, where the engine records them: see RequestOutput
    stop_reason: str | None = None  # with the last, the text of `stop` that ended the answer; None where something else did
    is_fault: bool = False  # with an error: the model gave no number to choose by, for which no request can be blamed


@dataclass
class RequestOutput:
    """A whole answer."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    experts: Tensor | None = None
    """int16 [tokens, layers, K]: what each MoE layer took for each token of prompt and answer but the last, which is never computed."""
    stop_reason: str | None = None
    """The text of `SamplingParams.stop` that ended the answer; None where a token, the length or an error did."""

    def add(self, increment: Increment) -> None:
        self.text += increment.text
        self.token_ids += increment.token_ids
        if increment.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs += increment.logprobs
        self.finish_reason = increment.finish_reason
        self.num_cached_tokens = increment.num_cached_tokens
        self.error = increment.error
        self.experts = increment.experts
        self.stop_reason = increment.stop_reason


@dataclass
class EngineStats:
    """Counters since the engine was made; drafts are MTP's guesses. `LLM.scheduler_stats` counts prompts and prefix hits."""

    steps: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that were what the model itself then chose; None before the first."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None
