"""EPLB: the published example, and what every placement must be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.parallel.eplb import balanced_packing, rebalance_experts, replicate_experts

WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_the_published_example() -> None:
    placed = rebalance_experts(WEIGHT, 16, 4, 2, 8)
    assert placed.physical_to_logical == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placed.replica_counts[0] == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert placed.logical_to_physical[0][5] == [0, 2]
    assert placed.logical_to_physical[0][6] == [1, -1]


def test_packing_by_hand() -> None:
    assert balanced_packing([9, 1, 5, 5], 2) == [[0, 1], [2, 3]]
    assert balanced_packing([1, 2, 3], 3) == [[0], [1], [2]]


def test_replicating_by_hand() -> None:
    assert replicate_experts([10, 4, 3], 6) == [0, 1, 2, 0, 0, 1]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], int, int, int, int]:
    nodes, per_node, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    gpus = nodes * per_node
    experts = groups * draw(st.integers(1, 4))
    replicas = gpus * (-(-experts // gpus) + draw(st.integers(0, 2)))
    load = st.floats(0, 1e6)
    weight = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=1, max_size=2))
    return weight, replicas, groups, nodes, gpus


@settings(max_examples=60)
@given(problems())
def test_every_placement_is_whole(problem: tuple[list[list[float]], int, int, int, int]) -> None:
    weight, replicas, groups, nodes, gpus = problem
    placed = rebalance_experts(*problem)
    for loads, physical, logical, counts in zip(
        weight, placed.physical_to_logical, placed.logical_to_physical, placed.replica_counts, strict=True
    ):
        assert len(physical) == replicas == sum(counts)
        assert min(counts) >= 1
        for expert, places in enumerate(logical):
            found = [place for place in places if place != -1]
            assert found == [place for place, one in enumerate(physical) if one == expert]
            assert len(found) == counts[expert]
        if groups % nodes == 0:  # hierarchical: a group's copies stay in one node
            size, per_node = len(loads) // groups, replicas // nodes
            for group in range(groups):
                members = range(group * size, (group + 1) * size)
                assert len({place // per_node for place, one in enumerate(physical) if one in members}) == 1
    assert replicas % gpus == 0


def test_copies_lower_the_heaviest_device() -> None:
    skewed = [[100.0] + [1.0] * 15]

    def heaviest(replicas: int) -> float:
        placed = rebalance_experts(skewed, replicas, 1, 1, 8)
        physical, counts = placed.physical_to_logical[0], placed.replica_counts[0]
        per_device = replicas // 8
        return max(
            sum(skewed[0][one] / counts[one] for one in physical[device * per_device : (device + 1) * per_device])
            for device in range(8)
        )

    assert heaviest(16) == 101
    assert heaviest(24) < 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((WEIGHT, 15, 4, 2, 8), r"num_gpus is 8, it must divide num_replicas \(15\)"),
        ((WEIGHT, 16, 5, 2, 8), r"num_groups is 5, it must divide the number of experts \(12\)"),
        ((WEIGHT, 16, 4, 3, 8), r"num_nodes is 3, it must divide num_gpus \(8\)"),
        ((WEIGHT, 8, 4, 2, 8), "below the 12 experts; use at least 16"),
        ((WEIGHT, 0, 4, 2, 8), "num_replicas is 0"),
        (([], 16, 4, 2, 8), "at least one layer"),
        (([[1.0, 2.0], [1.0]], 16, 1, 1, 8), "each layer the load of every expert"),
        (([[1.0, -2.0]], 8, 1, 1, 8), "negative or not finite"),
        (([[1.0, float("nan")]], 8, 1, 1, 8), "negative or not finite"),
    ],
)
def test_impossible_sizes(arguments: tuple[list[list[float]], int, int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rebalance_experts(*arguments)
