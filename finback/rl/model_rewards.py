"""Reward models as rewards (R1 in Nature, Methods): they score in the trainer's process, in batches, when the samples are there.

A pairwise (helpful) model reads the final answer only, a pointwise (safety) one the whole response, each as it was trained. A reward
model is another component of the sum, beside the rules.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finback.config import InputError, count_params
from finback.data.rated import Prompt
from finback.data.reasoning import opens_thought
from finback.data.tokenizer import THINK_TOKEN
from finback.model.checkpoint import open_checkpoint
from finback.model.reward_head import load_reward_head
from finback.rewards.reward import Score
from finback.rl.prompts import judges
from finback.rl.rollout import Completion
from finback.train.reward_scoring import RewardModel, load_reward_model

_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class ModelReward:
    """A reward model with its weight in the total."""

    name: str
    model: RewardModel
    weight: float


def split_spec(spec: str) -> tuple[str, float]:
    """Directory and weight of `DIR[:weight]`; what follows a colon and is no number belongs to the directory."""
    directory, colon, tail = spec.rpartition(":")
    try:
        weight = float(tail) if colon else math.nan
    except ValueError:
        return spec, 1.0
    if not colon:
        return spec, 1.0
    if not math.isfinite(weight):
        raise InputError(f"reward model {spec!r}: the weight is {tail}, it must be finite")
    return directory, weight


def absolute_spec(spec: str) -> str:
    """`spec` with an absolute directory."""
    directory, weight = split_spec(spec)
    return f"{os.path.abspath(directory)}:{weight:g}"


def model_reward_names(specs: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A name for each reward model: its directory's, or its run's where that is a checkpoint; numbered where several, or a reward in
    `taken`, have the same."""
    names: list[str] = []
    for spec in specs:
        parts = os.path.abspath(split_spec(spec)[0]).split(os.sep)
        base = parts[-3] if len(parts) > 2 and parts[-2] == _CHECKPOINTS else parts[-1]
        name, number = base, 1
        while name in names or name in taken:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def load_model_rewards(specs: Sequence[str], device: torch.device, taken: Sequence[str] = ()) -> list[ModelReward]:
    """The reward models of several specs; InputError where a directory holds none."""
    loaded = []
    for spec, name in zip(specs, model_reward_names(specs, taken), strict=True):
        directory, weight = split_spec(spec)
        loaded.append(ModelReward(name, load_reward_model(directory, device=device), weight))
    return loaded


def check_reward_model(spec: str) -> None:
    """InputError unless the directory of a spec holds a reward model."""
    model = open_checkpoint(split_spec(spec)[0]).config
    load_reward_head(Path(split_spec(spec)[0]), model.hidden_size, torch.device("cpu"))


def weight_bytes(specs: Sequence[str]) -> int:
    """Bytes of the models' weights, without loading them; InputError where a directory holds no model."""
    return sum(4 * count_params(open_checkpoint(split_spec(spec)[0]).config).total for spec in specs)


def add_model_scores(completions: Sequence[Completion], models: Sequence[ModelReward]) -> None:
    """Add each model's score to the samples whose rows it judges. One that is not finite counts 0 and is told as a failure."""
    for one in models:
        judged = [completion for completion in completions if judges(completion.prompt, one.name)]
        asked = [completion.prompt.example["prompt"] for completion in judged]
        texts = [response(completion.prompt.text, completion.text) for completion in judged]
        given = [completion.score for completion in judged if completion.score is not None]
        assert len(given) == len(judged), "rules score first"
        for completion, score in zip(judged, with_model(one, asked, texts, given), strict=True):
            completion.score = score


def with_model(one: ModelReward, asked: Sequence[Prompt], texts: Sequence[str], scores: Sequence[Score]) -> list[Score]:
    """`scores` with the model's component, in their order."""
    values = one.model.score(asked, texts) if texts else []
    return [_with(score, one, value) for score, value in zip(scores, values, strict=True)]


def _with(score: Score, one: ModelReward, value: float) -> Score:
    if not math.isfinite(value):
        failures = {**score.failures, one.name: f"gave {value}, not a finite number"}
        return replace(score, components={**score.components, one.name: 0.0}, failures=failures)
    return replace(score, total=score.total + one.weight * value, components={**score.components, one.name: value})


def response(prompt: str, text: str) -> str:
    """The whole response, with the tag that the rendered prompt may have opened it with: else an unfinished thought would pass for an
    answer."""
    opened = opens_thought(prompt) and not text.lstrip().startswith(THINK_TOKEN)
    return f"{THINK_TOKEN}\n{text}" if opened else text
