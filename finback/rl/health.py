"""What is watched while a policy learns (DESIGN section 4): numbers of a rollout and of its updates, and words for what goes wrong."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from finback.config import InputError
from finback.rewards.reflection import reflection_share
from finback.rl.batch import Batch
from finback.rl.config import GRPOConfig
from finback.rl.grpo import is_clipped, k3_divergence
from finback.rl.rollout import ENGINE, Rollout


def rollout_metrics(rollout: Rollout, rewards: Tensor, spread: Tensor) -> dict[str, float]:
    """Of the samples, before any update. `entropy` is the mean of -log p of the tokens drawn, which at temperature 1 is unbiased."""
    completions = rollout.completions
    tokens = sum(len(c.token_ids) for c in completions)
    components: dict[str, list[float]] = {}
    failed = 0
    for completion in completions:
        assert completion.score is not None
        failed += bool(completion.score.failures)
        for name, value in completion.score.components.items():
            components.setdefault(name, []).append(value)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(-1, correction=0).mean()),
        **{f"reward/{name}": math.fsum(values) / len(values) for name, values in components.items()},
        "failed_rewards": failed / len(completions),
        "completion_length": tokens / len(completions),
        "truncated": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "zero_variance": 1 - float(spread.double().mean()),
        "reflection": reflection_share(c.text for c in completions),
        "entropy": -math.fsum(value for c in completions for value in c.log_probs) / max(1, tokens),
        "rollout_tokens_per_second": tokens / max(rollout.seconds, 1e-9),
        "rollout_seconds": rollout.seconds,
        "reward_wait_seconds": rollout.waited,
    }


class UpdateTotals:
    """Sums over the tokens of one step's updates."""

    def __init__(self, config: GRPOConfig) -> None:
        self._config = config
        self._loss, self._updates = 0.0, 0
        self._tokens, self._clipped, self._kl = 0, 0.0, 0.0
        self._gap, self._gap_tokens = 0.0, 0
        self._computed = 0
        self._mtp_loss, self._mtp_updates = 0.0, 0
        self._norms: list[float] = []

    def add_gap(self, batch: Batch, log_probs: Tensor, step: int) -> None:
        """Compare with the engine, before any update. Raises InputError where the mean distance so far is above the limit."""
        self._gap += float(((log_probs - batch.engine_log_probs).abs() * batch.mask).sum())
        self._gap_tokens += int(batch.mask.sum())
        gap, limit = self._gap / self._gap_tokens, self._config.gap_limit
        if not gap <= limit:
            raise InputError(
                f"step {step}: the trainer's and the engine's log-probabilities differ by {gap:.4f} nats on average, above the limit "
                f"of {limit}; they no longer compute the same model. Use precision fp32, or raise max_logprob_gap if you know why"
            )

    def add(self, batch: Batch, log_probs: Tensor, loss: float) -> None:
        assert batch.old_log_probs is not None
        c = self._config
        self._loss += loss
        self._tokens += int(batch.mask.sum())
        self._computed += batch.num_tokens
        if c.loss == "sequence":
            ratio = ((log_probs - batch.old_log_probs) * batch.mask).sum(-1).exp()
            held = is_clipped(ratio, batch.advantages, c.epsilon, c.epsilon_high).unsqueeze(-1) & batch.mask
        else:
            ratio = (log_probs - batch.old_log_probs).exp()
            advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages.unsqueeze(-1)
            held = is_clipped(ratio, advantages, c.epsilon, c.epsilon_high) & batch.mask
        self._clipped += float(held.sum())
        if batch.reference_log_probs is not None:
            self._kl += float((k3_divergence(log_probs, batch.reference_log_probs) * batch.mask).sum())

    def add_mtp_loss(self, loss: float) -> None:
        """The mean over tokens and depths of one update."""
        self._mtp_loss, self._mtp_updates = self._mtp_loss + loss, self._mtp_updates + 1

    def add_norm(self, norm: float) -> None:
        self._norms.append(norm)

    @property
    def finite(self) -> bool:
        return all(math.isfinite(norm) for norm in self._norms)

    @property
    def grad_norm(self) -> float:
        """Mean over the updates; 0 without one."""
        return sum(self._norms) / max(1, len(self._norms))

    def metrics(self, seconds: float) -> dict[str, float]:
        """Of the step; what was not measured, for want of samples that teach something, is left out."""
        row = {
            "loss": self._loss / max(1, len(self._norms)),
            "grad_norm": self.grad_norm,
            "tokens_per_second": self._computed / max(seconds, 1e-9),
            "training_seconds": seconds,
        }
        if self._mtp_updates:
            row["mtp_loss"] = self._mtp_loss / self._mtp_updates
        if self._gap_tokens:
            row["logprob_gap"] = self._gap / self._gap_tokens
        if self._tokens:
            row["clip_fraction"] = self._clipped / self._tokens
            if self._config.beta:
                row["kl"] = self._kl / self._tokens
        return row


def kept_samples(rollout: Rollout, count: int) -> Iterator[dict[str, Any]]:
    """The first sample of each of the first `count` groups, as JSON values."""
    for group in rollout.groups[:count]:
        first = group[0]
        assert first.score is not None
        yield {
            "prompt": first.prompt.text,
            "completion": first.text,
            "reward": first.score.total,
            "components": dict(first.score.components),
            "failures": dict(first.score.failures),
        }


def tell_failures(rollout: Rollout, step: int, told: set[str]) -> Iterator[str]:
    """A sentence for each reward that has failed in a rollout for the first time; its name is then in `told`."""
    sentences: dict[str, Counter[str]] = {}
    places: dict[tuple[str, str], str] = {}
    judged: Counter[str] = Counter()
    for completion in rollout.completions:
        assert completion.score is not None
        judged.update(completion.score.components.keys())
        for name, sentence in completion.score.failures.items():
            sentences.setdefault(name, Counter())[sentence] += 1
            places.setdefault((name, sentence), completion.prompt.where)
    for name in [name for name in sentences if name not in told]:
        told.add(name)
        commonest, _ = sentences[name].most_common(1)[0]
        if name == ENGINE:
            yield f"step {step}: the engine {commonest} {sentences[name].total()} times; such samples count 0. It is told once"
            continue
        yield (
            f"step {step}: the reward {name} failed on {sentences[name].total()} of {judged[name]} samples, where it counts 0; most "
            f"often it {commonest}{_at(places[name, commonest])}. It is told once; failed_rewards in metrics.jsonl goes on counting"
        )


def nothing_to_learn(rewards: Tensor) -> str:
    """Why a run stands still, in words."""
    if float(rewards.max()) <= 0:
        return (
            "the reward has been 0 for every sample of the last steps, so there is nothing to learn from: look at samples.jsonl; is "
            "the form of the answer what the reward expects, is the task too hard for this model, is max_completion_length too short? "
            "finback rewards test tries a reward on known good and bad answers"
        )
    return (
        "in the last steps all samples of each prompt had the same reward, so there is nothing to learn from: the task may be "
        "solved, or the reward cannot tell samples apart"
    )


def _at(place: str) -> str:
    return f", first on {place}" if place else ""
