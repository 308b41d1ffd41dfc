"""Expert choice against a per-token implementation in plain Python, and the balance loss by hand.

Scores and biases of the property tests are whole multiples of 2^-20, so that sums are exact and "no tie" can be decided exactly.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from finback.ops.router import document_balance, gate_values, router_scores, select_experts, sequence_balance

UNIT = 2.0**-20


@pytest.fixture(autouse=True)
def both(implementation: str) -> None:
    """Every test with the C kernel and with torch alone."""


def best(values: dict[int, float], count: int) -> set[int] | None:
    """Keys of the `count` largest values; None if the last one ties with the first left out."""
    ordered = sorted(values, key=lambda key: -values[key])
    if count < len(ordered) and values[ordered[count - 1]] == values[ordered[count]]:
        return None
    return set(ordered[:count])


def select_by_hand(
    scores: list[float], bias: list[float], top_k: int, n_group: int, topk_group: int, method: str
) -> set[int] | None:
    """One token, as the papers say it: V3 section 2.1.2, V2 section 2.2."""
    choice = {expert: score + b for expert, (score, b) in enumerate(zip(scores, bias, strict=True))}
    if method != "greedy":
        size = len(scores) // n_group
        members = {group: range(group * size, (group + 1) * size) for group in range(n_group)}
        strength = {
            group: sum(sorted((choice[e] for e in experts), reverse=True)[: 2 if method == "noaux_tc" else 1])
            for group, experts in members.items()
        }
        kept = best(strength, topk_group)
        if kept is None:
            return None
        choice = {expert: choice[expert] for group in kept for expert in members[group]}
    return best(choice, top_k)


@st.composite
def routing(draw: st.DrawFn, biased: bool) -> tuple[Tensor, Tensor, int, int, int]:
    """scores [N, E], bias [E], K, groups, groups kept."""
    n_group, size = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tokens, experts = draw(st.integers(1, 6)), n_group * size
    scores = torch.randint(1, 2**20, (tokens, experts), generator=generator) * UNIT
    # Down to -1.5: most biased scores are then negative, and a dropped group that is masked with 0 would win.
    low, high = draw(st.sampled_from([(0, 1), (-(2**18), 2**18), (-3 * 2**19, -(2**20))])) if biased else (0, 1)
    return scores, torch.randint(low, high, (experts,), generator=generator) * UNIT, top_k, n_group, topk_group


@settings(max_examples=200)
@given(case=routing(biased=True))
def test_v3_choice_equals_the_one_by_hand(case: tuple[Tensor, Tensor, int, int, int]) -> None:
    check_choice(*case, method="noaux_tc")


@settings(max_examples=150)
@given(case=routing(biased=False), method=st.sampled_from(["greedy", "group_limited_greedy"]))
def test_v2_choice_equals_the_one_by_hand(case: tuple[Tensor, Tensor, int, int, int], method: str) -> None:
    check_choice(*case, method=method)


def check_choice(scores: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, method: str) -> None:
    by_hand = [select_by_hand(row, bias.tolist(), top_k, n_group, topk_group, method) for row in scores.tolist()]
    assume(None not in by_hand)
    indices = select_experts(scores, bias if method == "noaux_tc" else None, top_k, n_group, topk_group, method)
    assert indices.shape == (len(scores), top_k)
    assert indices.dtype == torch.int64
    assert [set(row) for row in indices.tolist()] == by_hand  # K distinct ones, then, from at most topk_group groups
    size = scores.shape[1] // n_group
    for row in indices.tolist():
        assert len(set(row)) == top_k
        assert method == "greedy" or len({expert // size for expert in row}) <= topk_group


def test_dropped_groups_are_masked_with_minus_infinity_and_not_with_zero() -> None:
    """Peers 7.1: where all biased scores are negative, experts of dropped groups would win with 0. Groups 0 and 1 of 3 are kept."""
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.9, 0.1]])
    bias = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.9, -1.0])
    # biased: -0.5 -0.6 | -0.7 -0.8 | -1.0 -0.9, group sums -1.1, -1.5, -1.9
    assert set(select_experts(scores, bias, 4, 3, 2).flatten().tolist()) == {0, 1, 2, 3}


def test_v3_groups_are_ranked_by_the_sum_of_two_and_v2_groups_by_the_best_one() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    assert set(select_experts(scores, None, 2, 2, 1, "noaux_tc").flatten().tolist()) == {2, 3}  # 1.1 against 1.0
    assert set(select_experts(scores, None, 2, 2, 1, "group_limited_greedy").flatten().tolist()) == {0, 1}
    assert set(select_experts(scores, None, 2, 2, 1, "greedy").flatten().tolist()) == {0, 2}


@settings(max_examples=100)
@given(case=routing(biased=True), normalise=st.booleans(), scaling=st.sampled_from([1.0, 2.5, 16.0]))
def test_the_bias_moves_the_choice_and_never_a_value(
    case: tuple[Tensor, Tensor, int, int, int], normalise: bool, scaling: float
) -> None:
    scores, bias, top_k, n_group, topk_group = case
    indices = select_experts(scores, bias, top_k, n_group, topk_group)
    values = gate_values(scores, indices, normalise, scaling)
    for row, chosen, value in zip(scores.tolist(), indices.tolist(), values.tolist(), strict=True):
        total = sum(row[expert] for expert in chosen) if normalise else 1.0
        assert value == pytest.approx([scaling * row[expert] / total for expert in chosen], rel=1e-5)
    if normalise:
        torch.testing.assert_close(values.sum(-1), torch.full((len(values),), scaling))


def test_raising_the_bias_of_one_expert_brings_it_in() -> None:
    scores = torch.rand(50, 8) * 0.5
    for expert in range(8):
        bias = torch.zeros(8)
        bias[expert] = 2.0
        assert (select_experts(scores, bias, 2, 4, 2) == expert).any(-1).all()
        bias[expert] = -2.0
        assert not (select_experts(scores, bias, 2, 4, 2) == expert).any()


def test_gate_values_of_vanishing_scores_are_finite() -> None:
    scores = torch.zeros(2, 4, requires_grad=True)
    values = gate_values(scores, torch.tensor([[0, 1], [2, 3]]), True, 2.5)
    values.sum().backward()
    assert values.isfinite().all()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_scores_are_float32_whatever_comes_in(scoring_func: str) -> None:
    """Facts 1.6: bfloat16 logits would tie experts. Also under autocast, which would multiply in bfloat16."""
    x, weight = torch.randn(20, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    exact = torch.nn.functional.linear(x.double(), weight.double())
    exact = exact.sigmoid() if scoring_func == "sigmoid" else exact.softmax(-1)
    scores = router_scores(x, weight, scoring_func)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = router_scores(x.float(), weight, scoring_func)
    for ours in (scores, mixed):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    if scoring_func == "softmax":
        torch.testing.assert_close(scores.sum(-1), torch.ones(20))


# V3 equations 17-20 by hand: E = 4 experts, K = 2, one sequence of T = 2 tokens.
#   s_1 = .8 .4 .2 .6  (sum 2):  s' = .40 .20 .10 .30, top 2 = {0, 3}
#   s_2 = .1 .9 .6 .4  (sum 2):  s' = .05 .45 .30 .20, top 2 = {1, 2}
#   f_i = E / (K T) * hits = 1 1 1 1;  P = .225 .325 .200 .250;  sum f P = 1
FIRST = [[0.8, 0.4, 0.2, 0.6], [0.1, 0.9, 0.6, 0.4]]
#   s_1 = .9 .6 .3 .2  (sum 2):  s' = .45 .30 .15 .10, top 2 = {0, 1}
#   s_2 = .5 .3 .1 .1  (sum 1):  s' = .50 .30 .10 .10, top 2 = {0, 1}
#   f = 2 2 0 0;  P = .475 .300 .125 .100;  sum f P = .95 + .60 = 1.55
SECOND = [[0.9, 0.6, 0.3, 0.2], [0.5, 0.3, 0.1, 0.1]]


def test_sequence_balance_by_hand() -> None:
    assert sequence_balance(torch.tensor(FIRST), 1, 2).item() == pytest.approx(1.0)
    assert sequence_balance(torch.tensor(SECOND), 1, 2).item() == pytest.approx(1.55)


def test_document_balance_by_hand() -> None:
    """The two documents mixed, with a token in between that is nobody's, and a document number that nobody has."""
    scores = torch.tensor([FIRST[0], SECOND[0], [0.9, 0.0, 0.0, 0.0], SECOND[1], FIRST[1]])
    documents = torch.tensor([0, 2, -1, 2, 0])
    assert document_balance(scores, documents, 3, 2).item() == pytest.approx(1.0 + 1.55)
    assert document_balance(scores, torch.full((5,), -1), 1, 2).item() == 0.0


@settings(max_examples=50)
@given(case=routing(biased=False), seed=st.integers(0, 9))
def test_document_balance_is_that_of_each_document_alone(case: tuple[Tensor, Tensor | None, int, int, int], seed: int) -> None:
    scores, top_k = case[0] + 0.01, case[2]
    scores.requires_grad_(True)
    documents = torch.randint(-1, 4, (len(scores),), generator=torch.Generator().manual_seed(seed))
    ours = document_balance(scores, documents, 4, top_k)
    (gradient,) = torch.autograd.grad(ours, scores)
    alone = sum(
        (sequence_balance(scores[documents == d], 1, top_k) for d in range(4) if bool((documents == d).any())),
        scores.sum() * 0,
    )
    (expected,) = torch.autograd.grad(alone, scores)
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_sequence_balance_is_per_sequence_and_not_per_batch() -> None:
    """The mean of both is 1.275. Over the batch as one: f = 1.5 1.5 .5 .5, P = .35 .3125 .1625 .175, sum 1.1625."""
    both = torch.tensor(FIRST + SECOND)
    assert sequence_balance(both, 2, 2).item() == pytest.approx(1.275)
    assert sequence_balance(both, 1, 2).item() == pytest.approx(1.1625)


def test_gradient_of_sequence_balance_by_hand() -> None:
    """Hits are constants: d/ds_j of sum_i f_i s_i / S is (f_j - sum_i f_i s_i / S) / S, over T. In SECOND's first token, sum f s' = 1.5
    and S = 2: (2 - 1.5) / 2 / 2 = .125 and (0 - 1.5) / 2 / 2 = -.375; in the second, 1.6 and S = 1: .2 and -.8."""
    scores = torch.tensor(SECOND, requires_grad=True)
    sequence_balance(scores, 1, 2).backward()
    expected = torch.tensor([[0.125, 0.125, -0.375, -0.375], [0.2, 0.2, -0.8, -0.8]])
    torch.testing.assert_close(scores.grad, expected)


def test_sequence_balance_of_perfect_balance_is_one() -> None:
    scores = torch.eye(8).repeat(3, 1) + 0.01
    assert sequence_balance(scores, 3, 1).item() == pytest.approx(1.0)
