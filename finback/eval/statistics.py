"""What a sample of answers says about a model: unbiased estimates and honest intervals. Pure Python, no torch.

The problems are the sample. Answers to one problem are alike (an easy one is solved every time), so k answers to n problems are
worth more than n and less than n k independent trials, and every interval here treats a problem as one cluster.
"""

import math
import random
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

from finback.config import InputError

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def consensus(answers: Sequence[Hashable | None]) -> int | None:
    """The place of the first answer among those that agree most; None where no sample has an answer.

    None, an answer that could not be read, has no vote. Among answers with equally many votes the one that came first wins,
    so that the result depends on nothing but the samples' order.
    """
    votes: dict[Hashable, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return None
    return answers.index(max(votes, key=votes.__getitem__))


def cons_at_k(answers: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """The score of the majority's answer (R1 section 3, cons@k); 0 where no sample has an answer."""
    place = consensus(answers)
    return 0.0 if place is None else scores[place]


def wilson_interval(share: float, trials: float, confidence: float = CONFIDENCE) -> Estimate:
    """Wilson's score interval for a share of `trials` independent trials; the number need not be whole."""
    if trials <= 0:
        raise InputError(f"a share of {trials} trials has no interval; give some problems")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At the ends the formula is exact up to rounding, which must not leave the value outside of its own interval.
    return Estimate(share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))


def clustered_interval(means: Sequence[float], samples: int = 1, confidence: float = CONFIDENCE) -> Estimate:
    """The mean over problems of scores between 0 and 1, with an interval that takes each problem as one cluster.

    `means[i]` is the mean score of problem i over its `samples` answers. The variance between problems gives the number of
    independent trials that the sample is worth (the design effect of survey statistics), and that many give Wilson's interval:
    unlike the normal one it does not close where all problems are solved, or none. The number is kept between n and n k, its
    bounds for clusters whose answers are alike, and independent. For the variance, and for nothing else, one problem that is
    always solved and one that never is are added: a few problems alone show too little of it, and the truth would be missed.
    """
    number = len(means)
    if number == 0:
        raise InputError("there is no problem to take a mean of")
    mean = min(max(fmean(means), 0.0), 1.0)
    if mean in (0.0, 1.0):
        return wilson_interval(mean, number, confidence)
    padded = [*means, 0.0, 1.0]
    middle = fmean(padded)
    variance = math.fsum((value - middle) ** 2 for value in padded) / (len(padded) - 1)
    trials = min(max(number * middle * (1 - middle) / variance, number), number * samples)
    return wilson_interval(mean, trials, confidence)


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = fmean,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic of one value per problem, with the percentile interval over problems drawn again with replacement."""
    if not values:
        raise InputError("there is no problem to resample")
    generator = random.Random(f"bootstrap/{seed}")
    drawn = sorted(statistic(generator.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1 - confidence) / 2
    return Estimate(statistic(values), _quantile(drawn, tail), _quantile(drawn, 1 - tail))


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of after - before over the same problems, with its interval: what two evaluations differ by.

    Problems that both solve, or neither, tell nothing of a difference, so this interval is narrower than those of the two
    means. Student's t over problems; one problem alone has an interval without end.
    """
    if len(before) != len(after) or not before:
        raise InputError(f"a paired difference needs the same problems twice, not {len(before)} and {len(after)}")
    differences = [late - early for early, late in zip(before, after, strict=True)]
    number, mean = len(differences), fmean(differences)
    if number == 1:
        return Estimate(mean, -math.inf, math.inf)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (number - 1) / number)
    half = student_quantile(0.5 + confidence / 2, number - 1) * error
    return Estimate(mean, mean - half, mean + half)


def student_quantile(probability: float, freedom: int) -> float:
    """A quantile above the median of Student's t: by bisection of its distribution, which has a closed form for whole degrees."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    squared, total = math.cos(angle) ** 2, 0.0
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    for step in range(freedom // 2):
        total += term
        term *= squared * ((2 * step + 2) / (2 * step + 3) if odd else (2 * step + 1) / (2 * step + 2))
    between = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + between / 2


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
