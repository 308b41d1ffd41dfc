"""Estimates against enumeration, published values and simulation."""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.eval.statistics import (
    bootstrap_interval,
    clustered_interval,
    cons_at_k,
    consensus,
    paired_difference,
    student_quantile,
    wilson_interval,
)
from finback.rewards.code import pass_at_k


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [True] * c + [False] * (n - c)
    subsets = list(combinations(right, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))), abs=1e-12)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(1000, 0, 1000) == 0.0
    assert pass_at_k(1000, 999, 2) == 1.0


@pytest.mark.parametrize(
    ("answers", "place"),
    [
        (["7", "8", "8"], 1),
        (["7", "8", "8", "7"], 0),  # a tie goes to the one that came first
        (["9", "8", "7"], 0),
        ([None, None, "8"], 2),  # no answer has no vote
        ([None, None], None),
        (["a"], 0),
    ],
)
def test_consensus(answers: list[str | None], place: int | None) -> None:
    assert consensus(answers) == place


def test_cons_at_k_is_the_majoritys_score() -> None:
    assert cons_at_k(["7", "8", "8"], [1.0, 0.0, 0.0]) == 0.0
    assert cons_at_k(["7", "8", "7"], [1.0, 0.0, 1.0]) == 1.0
    assert cons_at_k([None, "8", "7", "7"], [0.0, 0.0, 1.0, 1.0]) == 1.0
    assert cons_at_k([None, None], [0.0, 0.0]) == 0.0


def test_wilson_interval_has_the_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for right, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        estimate = wilson_interval(right / trials, trials)
        assert estimate.value == right / trials
        assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_quantiles_of_students_t_are_those_of_the_tables() -> None:
    for freedom, expected in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)):
        assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_a_clustered_interval_lies_between_those_of_alike_and_independent_answers(counts: list[int]) -> None:
    means = [count / 4 for count in counts]
    estimate = clustered_interval(means, 4)
    wide, narrow = wilson_interval(fmean(means), len(means)), wilson_interval(fmean(means), 4 * len(means))
    assert estimate.value == pytest.approx(fmean(means))
    assert wide.low - 1e-12 <= estimate.low <= narrow.low + 1e-12
    assert narrow.high - 1e-12 <= estimate.high <= wide.high + 1e-12
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_one_sample_is_wilsons_interval() -> None:
    assert clustered_interval([1.0, 0.0, 1.0, 1.0]) == pytest.approx(wilson_interval(0.75, 4))
    assert clustered_interval([1.0] * 7, 16) == pytest.approx(wilson_interval(1.0, 7))


def _coverage(true_mean: float, alpha: float, problems: int, samples: int, repeats: int = 1500) -> float:
    """How often the interval holds the truth, where a problem's chance is Beta-distributed."""
    generator = random.Random(f"{true_mean}/{alpha}/{problems}/{samples}")
    held = 0
    for _ in range(repeats):
        means = []
        for _ in range(problems):
            chance = generator.betavariate(alpha * true_mean, alpha * (1 - true_mean))
            means.append(sum(generator.random() < chance for _ in range(samples)) / samples)
        estimate = clustered_interval(means, samples)
        held += estimate.low <= true_mean <= estimate.high
    return held / repeats


@pytest.mark.parametrize("true_mean", [0.05, 0.5, 0.85])
@pytest.mark.parametrize(("alpha", "samples"), [(0.5, 8), (4.0, 8), (1.0, 1)])
def test_clustered_intervals_hold_the_truth_as_often_as_they_say(true_mean: float, alpha: float, samples: int) -> None:
    assert 0.925 <= _coverage(true_mean, alpha, 60, samples) <= 0.99


def test_an_interval_that_forgets_the_clusters_fails_that_test() -> None:
    """The simulation can tell: as many independent trials as samples are claimed, and the truth is missed far too often."""
    generator, held = random.Random(1), 0
    for _ in range(500):
        means = [
            sum(generator.random() < chance for _ in range(8)) / 8
            for chance in (generator.betavariate(0.25, 0.25) for _ in range(60))
        ]
        estimate = wilson_interval(fmean(means), 8 * 60)
        held += estimate.low <= 0.5 <= estimate.high
    assert held / 500 < 0.75


def test_bootstrap_agrees_with_the_formula_where_both_hold() -> None:
    generator = random.Random(3)
    values = [generator.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(200)]
    drawn, formula = bootstrap_interval(values), clustered_interval(values, 4)
    assert drawn.value == formula.value
    assert drawn.low == pytest.approx(formula.low, abs=0.01)
    assert drawn.high == pytest.approx(formula.high, abs=0.01)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1) != drawn
    assert bootstrap_interval([0.3]) == (0.3, 0.3, 0.3)
    assert bootstrap_interval(values, max).value == 1.0


def test_paired_difference_by_hand() -> None:
    """Differences 0, 1, 1, 0: mean 0.5, standard error sqrt(1/3)/2, t with 3 degrees 3.1824."""
    estimate = paired_difference([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    half = 3.182446 * math.sqrt(1 / 3) / 2
    assert estimate == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)
    assert paired_difference([0.2], [0.4]).low == -math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: clustered_interval([]),
        lambda: bootstrap_interval([]),
        lambda: wilson_interval(0.5, 0),
        lambda: paired_difference([], []),
        lambda: paired_difference([1.0], [1.0, 0.0]),
    ],
)
def test_nothing_to_count_is_told(call: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        call()
