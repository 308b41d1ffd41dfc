"""The router-bias update against hand-computed numbers, and its independence of how a batch is cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.train.balance import max_violation, update_expert_bias


def test_overloaded_experts_go_down_and_underloaded_up() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    other = torch.zeros(4)
    counts = torch.tensor([[10, 2, 4, 4], [5, 5, 5, 5]])  # means 5 and 5
    update_expert_bias([bias, other], counts, 0.125)
    assert bias.tolist() == [0.375, 0.125, -0.125, 0.125]
    assert other.tolist() == [0.0] * 4


def test_a_load_equal_to_a_mean_that_is_no_float_does_not_move() -> None:
    # mean 1/3 of 3 * 10**17 + 3: exact in integers, not in float32 or float64
    load = 10**17 + 1
    bias = torch.zeros(3)
    update_expert_bias([bias], torch.tensor([[load, load, load]]), 1.0)
    assert bias.tolist() == [0.0] * 3
    update_expert_bias([bias], torch.tensor([[load, load + 1, load - 1]]), 1.0)
    assert bias.tolist() == [0.0, -1.0, 1.0]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_the_cut_into_micro_batches_does_not_matter(batch: list[list[int]], pieces: int) -> None:
    counts = torch.tensor(batch)
    whole, cut = torch.zeros(4), torch.zeros(4)
    update_expert_bias([whole], counts.sum(0, keepdim=True), 0.001)
    total = torch.zeros(1, 4, dtype=torch.int64)
    for piece in counts.split(-(-len(batch) // pieces)):
        total += piece.sum(0, keepdim=True)
    update_expert_bias([cut], total, 0.001)
    assert torch.equal(whole, cut)


def test_max_violation_by_hand() -> None:
    assert max_violation(torch.tensor([[4, 4, 4, 4]])) == 0.0
    assert max_violation(torch.tensor([[8, 0, 0, 0]])) == 3.0
    assert max_violation(torch.tensor([[4, 4, 4, 4], [6, 2, 4, 4]])) == 0.5
    assert max_violation(torch.zeros(0, 4, dtype=torch.int64)) == 0.0
