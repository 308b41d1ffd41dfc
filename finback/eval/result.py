"""The numbers of an evaluation, from one line per sample: no text is needed to compute them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from finback.eval.config import Decoding, PromptForm
from finback.eval.statistics import Estimate, clustered_interval, cons_at_k, wilson_interval
from finback.rewards.code import pass_at_k


@dataclass(frozen=True)
class Sample:
    """One answer to one problem."""

    problem: int
    """Its place in the task."""
    number: int
    """0 .. k - 1: which of the problem's samples it is."""
    prompt: str
    completion: str
    score: float
    answer: str | None
    """What was read from it; None where nothing could be."""
    formatted: bool
    """A thought between its tags, and something behind it (`finback.rewards.format.think_then_answer`)."""
    mixes: bool
    """Whether its thought mixes languages (`finback.rewards.language.mixing`); of a completion without a thought, the whole."""
    tokens: int
    finish_reason: Literal["stop", "length", "abort", "error"]
    failure: str = ""
    """Why it has no score, in a sentence; it then counts 0."""


@dataclass(frozen=True)
class FamilyResult:
    """The part of a task that is of one family."""

    problems: int
    pass_at_1: Estimate


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task. Shares are between 0 and 1; intervals are of 95%, over problems."""

    task: str
    prompt_form: PromptForm
    decoding: Decoding
    problems: int
    samples: int
    """Per problem (k)."""
    pass_at_1: Estimate
    """The mean score over problems and their samples (R1 section 3)."""
    cons_at_k: Estimate
    """The score of the answer that most of a problem's samples give; among equally many, of the earliest."""
    pass_at_k: Mapping[int, Estimate]
    """k -> the chance that one of k samples is right, unbiased, for the powers of two and all samples. A score of 0.5 or more
    counts as right."""
    format_rate: float
    """Samples that are a thought between its tags with something behind it."""
    mixing_rate: float
    """Samples whose thought mixes languages."""
    mean_tokens: float
    """Length of an answer."""
    truncated: float
    """Samples that ended at the length limit."""
    failed: int
    """Samples that the engine could not finish, or whose score failed; they count 0."""
    failures: Mapping[str, int]
    """Why -> how many, the commonest first."""
    families: Mapping[str, FamilyResult]
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    scores: Sequence[float]
    """The mean score of each problem, in the task's order: two results of one task are compared by `paired_difference` of these."""
    kept: Sequence[Sample] = field(default=(), repr=False)
    """The first samples of the first problems, with their texts, for a report."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every number, no sample."""
        return _plain(asdict(replace(self, kept=())))


@dataclass(frozen=True)
class ChoiceResult:
    """What a model chose by likelihood. A question with a tie for the best choice counts as missed."""

    task: str
    prompt_form: PromptForm
    problems: int
    accuracy: Estimate
    """The right choice has the highest log-likelihood."""
    accuracy_per_byte: Estimate
    """The same with each log-likelihood divided by the bytes of the choice, so that short choices have no advantage."""
    prompt_tokens: int
    seconds: float
    scores: Sequence[float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return _plain(asdict(self))


AnyResult = TaskResult | ChoiceResult


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON has them: estimates with the names of their parts, keys as texts, and no empty `kept`."""

    def named(value: Any) -> Any:
        if isinstance(value, Estimate):
            return value._asdict()
        if isinstance(value, Mapping):
            return {str(key): named(inner) for key, inner in value.items()}
        return [named(inner) for inner in value] if isinstance(value, list | tuple) else value

    return {name: named(value) for name, value in values.items() if name != "kept"}


class Tally:
    """Collects samples, in any order, one small record of each."""

    def __init__(self, families: Sequence[str], samples: int) -> None:
        """`families[i]` is the family of problem i, empty where there is none; each has `samples` samples."""
        self.families, self.samples = families, samples
        self._scores = [[0.0] * samples for _ in families]
        self._answers: list[list[str | None]] = [[None] * samples for _ in families]
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def add(self, sample: Sample) -> None:
        self._scores[sample.problem][sample.number] = sample.score
        self._answers[sample.problem][sample.number] = sample.answer
        self._counts.update(
            samples=1,
            tokens=sample.tokens,
            formatted=sample.formatted,
            mixes=sample.mixes,
            truncated=sample.finish_reason == "length",
        )
        if sample.failure:
            self._failures[sample.failure] += 1

    @property
    def failed(self) -> int:
        """Samples without a score so far."""
        return self._failures.total()

    @property
    def mean_score(self) -> float:
        """Of the samples so far."""
        return sum(map(sum, self._scores)) / max(1, self._counts["samples"])

    def result(
        self,
        task: str,
        form: PromptForm,
        decoding: Decoding,
        *,
        prompt_tokens: int,
        seconds: float,
        kept: Sequence[Sample] = (),
    ) -> TaskResult:
        """The numbers, once every sample was added."""
        total, k = self._counts["samples"], self.samples
        assert total == len(self.families) * k
        means = [fmean(scores) for scores in self._scores]
        right = [sum(score >= 0.5 for score in scores) for scores in self._scores]
        votes = [cons_at_k(answers, scores) for answers, scores in zip(self._answers, self._scores, strict=True)]
        sizes = sorted({k, *(2**i for i in range(k.bit_length()) if 2**i <= k)})
        named = sorted({family for family in self.families if family})
        return TaskResult(
            task=task,
            prompt_form=form,
            decoding=decoding,
            problems=len(self.families),
            samples=k,
            pass_at_1=clustered_interval(means, k),
            cons_at_k=wilson_interval(fmean(votes), len(votes)),
            pass_at_k={size: clustered_interval([pass_at_k(k, c, size) for c in right], k) for size in sizes},
            format_rate=self._counts["formatted"] / total,
            mixing_rate=self._counts["mixes"] / total,
            mean_tokens=self._counts["tokens"] / total,
            truncated=self._counts["truncated"] / total,
            failed=self.failed,
            failures=dict(self._failures.most_common()),
            families={family: self._family(family, means) for family in named},
            prompt_tokens=prompt_tokens,
            generated_tokens=self._counts["tokens"],
            seconds=seconds,
            scores=tuple(means),
            kept=tuple(kept),
        )

    def _family(self, family: str, means: Sequence[float]) -> FamilyResult:
        own = [mean for mean, name in zip(means, self.families, strict=True) if name == family]
        return FamilyResult(len(own), clustered_interval(own, self.samples))
