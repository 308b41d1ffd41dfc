"""Settings of `finback reject` and `finback judge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from finback.config import InputError


@dataclass(frozen=True)
class RejectConfig:
    """What `finback reject` takes."""

    model: Positional[Path]
    """Hugging Face directory of the model that is sampled."""
    data: tuple[Path, ...]
    """.jsonl or .parquet files with a prompt in each row, and what the rewards read (answer, tests, ...)."""
    reward: tuple[str, ...]
    """Checks, as module:function[:threshold]; a sample must reach the threshold (1 without one) of each."""
    out: Path
    """The .jsonl file of conversations to write, for finback sft."""
    num_samples: int = 4
    """Samples of each prompt."""
    keep: int = 2
    """Most samples kept of a prompt; of more that pass, the shortest stay."""
    max_prompts: int | None = None
    """Take so many prompts from the beginning; None is all."""
    temperature: float = 1.0
    """Logits are divided by it; 0 would make all samples of a prompt the same."""
    max_tokens: int = 256
    """Longest sample in tokens; one that does not end by itself is dropped."""
    template: str | None = None
    """A text with {prompt} in it, in the place of the model's chat template."""
    reward_deadline: float = 10.0
    """Seconds that a reward may take for a sample."""
    seed: int = 0
    """The same seed gives the same samples."""
    device: str = "auto"
    """"cpu", "cuda", ...; auto: the first GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "keep", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise InputError(f"max_prompts is {self.max_prompts}, it must be at least 1; leave it out to take all")
        if self.keep > self.num_samples:
            raise InputError(f"keep is {self.keep}, more than num_samples {self.num_samples}; lower keep")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}, it must be above 0: samples of a prompt must differ")
        if not 0 < self.reward_deadline < float("inf"):
            raise InputError(f"reward_deadline is {self.reward_deadline}, it must be a number of seconds above 0")


@dataclass(frozen=True)
class JudgeConfig:
    """What `finback judge` takes."""

    file: Positional[Path]
    """.jsonl or .parquet; of rows, {"messages"} or {"prompt", "completion"}; of pairs, {"prompt", "responses"}."""
    judge: str
    """http(s)://... of an OpenAI-style endpoint, the directory of a model, or a rule as module:function (as rewards are named)."""
    out: Path
    """The .jsonl file to write."""
    make: Literal["rows", "pairs"] = "rows"
    """rows keeps those whose score is high enough; pairs makes preference pairs of responses, for finback reward-model."""
    judge_model: str = "default"
    """Name of the model at the endpoint."""
    api_key_env: str = ""
    """The environment variable that holds the endpoint's key; empty sends none."""
    least_score: float = 6.0
    """Of rows: the least mean score (1 to 10 from a model; a rule has its own scale)."""
    least_delta: float = 1.0
    """Of pairs: the mean difference must be above it."""
    judgements: int = 4
    """How often each row or pair is judged; of pairs, each order as often as the other."""
    workers: int = 1
    """Judgements asked for at once; a model in a directory answers one at a time."""
    temperature: float = 1.0
    """Of the judge's replies."""
    max_tokens: int = 1024
    """Longest reply of the judge."""
    timeout_seconds: float = 120.0
    """How long a reply of the endpoint, or a call of the rule, may take."""
    retries: int = 2
    """How often a judgement that failed is asked for again."""
    pause_seconds: float = 1.0
    """Pause before the first retry; it doubles with each."""
    seed: int = 0
    """Draws pairs and orders."""

    def __post_init__(self) -> None:
        for name, least in (("judgements", 1), ("workers", 1), ("max_tokens", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least {least}")
        if not self.least_delta >= 0:
            raise InputError(f"least_delta is {self.least_delta}, it must be at least 0")
        if not self.timeout_seconds > 0 or not self.pause_seconds >= 0:
            raise InputError(
                f"timeout_seconds is {self.timeout_seconds} and pause_seconds {self.pause_seconds}; give above 0 and 0"
            )
