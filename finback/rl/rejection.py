"""Rejection sampling (R1 section 2.3.3): several samples of each prompt, of which those that pass every check are kept. It is resumed
prompt by prompt."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Reward
from finback.rl.prompts import Prompt
from finback.rl.rollout import Completion, sample_groups
from finback.train.metrics import append_line

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
    failures: tuple[tuple[str, int], ...] = ()
    """What went wrong in rewards, which then count 0, and on how many samples, the commonest first."""

    @property
    def kept(self) -> int:
        return self.stages[-1][1]

    def lines(self) -> Iterator[str]:
        """The funnel in words, a line each."""
        first = max(1, self.stages[0][1])
        for name, count in self.stages:
            yield f"{name:<28} {count:>8,}  {count / first:6.1%}"
        yield f"{'prompts with a sample left':<28} {self.prompts_kept:>8,}  of {self.prompts:,}"
        if self.failures:
            yield self.failure

    @property
    def failure(self) -> str:
        """The failures of rewards in a sentence."""
        commonest, _ = self.failures[0]
        times = sum(count for _, count in self.failures)
        return f"rewards failed {times:,} times, where they count 0; most often {commonest}"


class Sieved(NamedTuple):
    """What the sieves left of one prompt's samples."""

    counts: tuple[int, ...]
    """Samples, and how many were left after each sieve but the last."""
    kept: tuple[str, ...]
    """The texts of those that stay."""
    failures: tuple[tuple[str, int], ...]
    """What went wrong in rewards, and on how many of the samples."""


class Journal:
    """What was kept of each finished prompt in a file, a line each as they come, so that a run that stopped samples none of them again.

    The file belongs to the settings that it was started with, of which its first line holds the hash; other settings are an
    InputError. Half a last line, which a process that was killed left, is cut off.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.finished: dict[int, Sieved] = {}
        text = json.dumps(settings, sort_keys=True, default=str)
        identity = {"settings": hashlib.sha256(text.encode()).hexdigest()}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.exists() else []
        with io.FileIO(path, "a") as file:
            file.truncate(sum(map(len, lines)))
            if not lines:
                append_line(file, identity)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    same = row == identity
                else:
                    failures = tuple((str(sentence), int(count)) for sentence, count in row["failures"])
                    self.finished[int(row["place"])] = Sieved(tuple(row["counts"]), tuple(row["kept"]), failures)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}, line {number} is damaged; remove the file to start over") from None
            if number == 1 and not same:
                raise InputError(
                    f"{path} holds samples of a run with other settings, data or models; give the words again that it was started "
                    "with, or remove it to start over"
                )

    def add(self, place: int, sieved: Sieved) -> None:
        """A finished prompt. Raises OSError on a full disk; what was there before stays."""
        with io.FileIO(self.path, "a") as file:
            append_line(file, {"place": place, **sieved._asdict()})
        self.finished[place] = sieved


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
    journal: Journal,
) -> tuple[list[dict[str, Any]], Funnel]:
    """Up to `keep_per_prompt` samples of each prompt that end by themselves, pass every check and differ from each other, as rows of
    the prompt's text as the model read it, the completion, and the example that they come from.

    `pool` scores by the checks' rewards, in their order. Where more pass, the shortest stay. Prompts that the journal knows are not
    sampled again, and what comes of the others goes into it. Raises InputError if the pool has other rewards.
    """
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        part = range(start, min(start + _PROMPTS_AT_ONCE, len(prompts)))
        waiting = {
            place - start: [Completion(prompts[place]) for _ in range(num_samples)]
            for place in part
            if place not in journal.finished
        }
        for _ in sample_groups(llm, pool, dict(waiting), params, seed=seed, step=start):
            for place in [i for i, group in waiting.items() if all(sample.score is not None for sample in group)]:
                journal.add(start + place, _sieve(waiting.pop(place), checks, keep_per_prompt))
    found = [journal.finished[place] for place in range(len(prompts))]
    rows = [
        {"prompt": prompt.text, "completion": text, "example": dict(prompt.example)}
        for prompt, sieved in zip(prompts, found, strict=True)
        for text in sieved.kept
    ]
    names = ("sampled", "ended by themselves", *(check.name for check in checks), "different")
    counts = [sum(sieved.counts[sieve] for sieved in found) for sieve in range(len(names))]
    stages = (*zip(names, counts, strict=True), (f"at most {keep_per_prompt} a prompt", len(rows)))
    kept = {id(prompt) for prompt, sieved in zip(prompts, found, strict=True) if sieved.kept}
    failures: Counter[str] = Counter()
    for sieved in found:
        failures.update(dict(sieved.failures))
    return rows, Funnel(stages, len(prompts), len(kept), tuple(failures.most_common()))


def _sieve(group: Sequence[Completion], checks: Sequence[Check], keep: int) -> Sieved:
    left = [completion for completion in group if completion.finish_reason == "stop"]
    counts = [len(group), len(left)]
    for check in checks:
        left = [completion for completion in left if _value(completion, check) >= check.least]
        counts.append(len(left))
    different = list({completion.text: completion for completion in left}.values())
    shortest = sorted(different, key=lambda completion: len(completion.token_ids))[:keep]
    failures = Counter(f"{name} {sentence}" for c in group if c.score is not None for name, sentence in c.score.failures.items())
    return Sieved((*counts, len(different)), tuple(completion.text for completion in shortest), tuple(failures.items()))


def _value(completion: Completion, check: Check) -> float:
    assert completion.score is not None
    for reward in check.rewards:
        if reward.name not in completion.score.components:
            raise InputError(f"the reward processes do not compute the check {reward.name}; give them the checks' rewards")
    return sum(reward.weight * completion.score.components[reward.name] for reward in check.rewards)
