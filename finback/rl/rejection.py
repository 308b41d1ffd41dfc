"""Rejection sampling (R1 section 2.3.3): several samples of each prompt, of which those that pass every check are kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Reward
from finback.rl.prompts import Prompt
from finback.rl.rollout import Completion, roll_out

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Check:
    """What a sample must reach: the weighted value of a reward, or the weighted sum of several."""

    rewards: tuple[Reward, ...]
    least: float = 1.0

    @property
    def name(self) -> str:
        return " + ".join(reward.name for reward in self.rewards)


@dataclass(frozen=True)
class Funnel:
    """How many samples were left after each sieve, in order."""

    stages: tuple[tuple[str, int], ...]
    prompts: int
    """Prompts that were asked."""
    prompts_kept: int
    """Prompts of which a sample is left."""

    @property
    def kept(self) -> int:
        return self.stages[-1][1]

    def lines(self) -> Iterator[str]:
        """The funnel in words, a line each."""
        first = max(1, self.stages[0][1])
        for name, count in self.stages:
            yield f"{name:<28} {count:>8,}  {count / first:6.1%}"
        yield f"{'prompts with a sample left':<28} {self.prompts_kept:>8,}  of {self.prompts:,}"


def rejection_sample(
    llm: LLM,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    checks: Sequence[Check],
    params: SamplingParams,
    *,
    num_samples: int,
    keep_per_prompt: int,
    seed: int,
) -> tuple[list[Completion], Funnel]:
    """Up to `keep_per_prompt` samples of each prompt that end by themselves, pass every check and differ from each other.

    `pool` scores by the checks' rewards, in their order. Where more pass, the shortest stay. Raises InputError if the pool has
    other rewards.
    """
    names = [check.name for check in checks]
    kept: list[Completion] = []
    counts = dict.fromkeys(["sampled", "ended by themselves", *names, "different"], 0)
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        part = prompts[start : start + _PROMPTS_AT_ONCE]
        for group in roll_out(llm, pool, part, num_samples, params, seed=seed, step=start).groups:
            counts["sampled"] += len(group)
            left = [completion for completion in group if completion.finish_reason == "stop"]
            counts["ended by themselves"] += len(left)
            for check in checks:
                left = [completion for completion in left if _value(completion, check) >= check.least]
                counts[check.name] += len(left)
            different = list({completion.text: completion for completion in left}.values())
            counts["different"] += len(different)
            kept += sorted(different, key=lambda completion: len(completion.token_ids))[:keep_per_prompt]
    stages = (*counts.items(), (f"at most {keep_per_prompt} a prompt", len(kept)))
    return kept, Funnel(stages, len(prompts), len({id(completion.prompt) for completion in kept}))


def _value(completion: Completion, check: Check) -> float:
    assert completion.score is not None
    for reward in check.rewards:
        if reward.name not in completion.score.components:
            raise InputError(f"the reward processes do not compute the check {reward.name}; give them the checks' rewards")
    return sum(reward.weight * completion.score.components[reward.name] for reward in check.rewards)


def kept_rows(completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
    """What was kept, as rows for fine-tuning: the prompt's text as the model read it, the completion, and where they come from."""
    for completion in completions:
        row: Mapping[str, Any] = completion.prompt.example
        yield {"prompt": completion.prompt.text, "completion": completion.text, "example": dict(row)}
