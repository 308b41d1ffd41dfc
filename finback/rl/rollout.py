"""Samples from the policy, scored while others are still being written."""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.request import FinishReason
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Reward, Score
from finback.rl.prompts import Prompt, judges

ENGINE = "engine"
"""Stands for the engine among the failures of a score."""


@dataclass
class Completion:
    """One sample of a prompt; `log_probs` are the engine's, of its tokens, at temperature 1."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    score: Score | None = None
    text_lengths: list[int] = field(default_factory=list)
    """Characters of the text that are there with each token."""
    experts: Tensor | None = None
    """int16 [prompt and sample but the last token, layers, K]: what the engine's routers chose, where it is recorded."""

    @property
    def reward(self) -> float:
        assert self.score is not None, "not scored yet"
        return self.score.total


@dataclass(frozen=True)
class Rollout:
    """The samples of one step: `groups[i]` are those of prompt i."""

    groups: list[list[Completion]]
    seconds: float
    """Of sampling and scoring together."""
    waited: float
    """Of these, with nothing left to sample: what the rewards cost the trainer."""

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group]


def roll_out(
    llm: LLM,
    pool: RewardPool | None,
    prompts: Sequence[Prompt],
    num_generations: int,
    params: SamplingParams,
    *,
    seed: int,
    step: int,
) -> Rollout:
    """`num_generations` samples of each prompt and their scores, as `sample_groups` draws them."""
    start = sampled = time.perf_counter()
    groups = [[Completion(prompt) for _ in range(num_generations)] for prompt in prompts]
    for sampling in sample_groups(llm, pool, dict(enumerate(groups)), params, seed=seed, step=step):
        if sampling:
            sampled = time.perf_counter()
    end = time.perf_counter()
    return Rollout(groups, end - start, end - sampled)


def sample_groups(
    llm: LLM,
    pool: RewardPool | None,
    groups: Mapping[int, list[Completion]],
    params: SamplingParams,
    *,
    seed: int,
    step: int,
) -> Iterator[bool]:
    """Fill in the samples and their scores, `groups` being place -> empty samples of the prompt there. Yields after each step of the
    engine, and then (False) after each wait for scores, so that others can take what is finished.

    A sample's draws depend on (seed, step, its prompt's place, its own place) and nothing else. Finished samples go to the
    reward processes at once; one that no reward can score by its deadline comes back with 0 and the reason, so that none
    is waited for without end. One that the engine has lost counts 0, too; one that it cannot finish counts as it is.
    Without a `pool` all have score 0.
    """
    places: dict[int, tuple[int, int]] = {}
    try:
        for i, group in groups.items():
            for j, completion in enumerate(group):
                drawn = SamplingParams(**(vars(params) | {"seed": sample_seed(seed, step, i, j), "logprobs": 0}))
                places[llm.add(completion.prompt.token_ids, drawn)] = (i, j)
        unfinished = set(places)
        while unfinished:
            if not llm.has_unfinished:  # it has lost them: nobody will finish them
                for i, j in (places[request_id] for request_id in unfinished):
                    groups[i][j] = Completion(groups[i][j].prompt, score=Score(0.0, {}, {ENGINE: "lost its sample"}))
                break
            for increment in llm.step():
                i, j = places[increment.request_id]
                completion = groups[i][j]
                completion.token_ids += increment.token_ids
                completion.log_probs += [entry.logprob for entry in increment.logprobs or ()]
                completion.text += increment.text
                completion.text_lengths += [len(completion.text)] * len(increment.token_ids)
                if increment.finish_reason is not None:
                    completion.finish_reason, completion.experts = increment.finish_reason, increment.experts
                    unfinished.discard(increment.request_id)
                    if pool is None:
                        completion.score = Score(0.0, {})
                    else:
                        pool.submit((i, j), completion.prompt.text, completion.text, completion.prompt.example)
            if pool is not None:
                _collect(pool, groups, wait=False)
            yield True
    finally:
        for request_id in places:
            llm.abort(request_id)
    while pool is not None and pool.outstanding:
        _collect(pool, groups, wait=True)
        yield False


def _collect(pool: RewardPool, groups: Mapping[int, Sequence[Completion]], *, wait: bool) -> None:
    for key, score in pool.collect(wait=wait):
        assert isinstance(key, tuple)
        i, j = key
        groups[i][j].score = own_score(score, groups[i][j].prompt, pool.rewards)


def own_score(score: Score, prompt: Prompt, rewards: Sequence[Reward]) -> Score:
    """Of a sample's score what comes from the rewards that judge its row; the others are left out of it."""
    if prompt.judged_by is None:
        return score
    components = {name: value for name, value in score.components.items() if judges(prompt, name)}
    failures = {name: sentence for name, sentence in score.failures.items() if judges(prompt, name)}
    total = sum(reward.weight * components[reward.name] for reward in rewards if reward.name in components)
    steps = {name: found for name, found in score.steps.items() if judges(prompt, name)}
    return Score(float(total), components, failures, steps)


def sample_seed(*parts: int) -> int:
    """63 bits that depend on all of `parts`."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
