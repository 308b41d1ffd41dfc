"""Expert-parallel load balancing (EPLB; V3 section 3.4): which experts to copy, and on which device each copy lies.

Pure Python, nothing of ours, no torch: it runs every few minutes on the loads of a layer, not on the way of a token. A *logical*
expert is one of the model's, a *physical* one a copy of it in a place; places are numbered device by device, node by node.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Placement(NamedTuple):
    """For each layer: the logical expert of every place, the places of every logical expert (padded with -1 to the longest list of all
    layers), and how many places each has."""

    physical_to_logical: list[list[int]]
    logical_to_physical: list[list[list[int]]]
    replica_counts: list[list[int]]


def rebalance_experts(
    weight: Sequence[Sequence[float]], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Place `num_replicas` copies of the experts whose loads are `weight` [layers, experts] on `num_gpus` devices in `num_nodes` nodes.

    Where the `num_groups` expert groups divide evenly among nodes, groups stay whole inside a node (hierarchical: less traffic between
    nodes, for small expert parallelism as in prefill); else experts are placed freely (global, for decoding).

    Raises:
        ValueError: sizes that do not divide, with what must divide what, or loads that are negative or not finite.
    """
    experts = _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers = [_place(list(map(float, loads)), num_replicas, num_groups, num_nodes, num_gpus) for loads in weight]
    places = [[[place for place, one in enumerate(layer) if one == expert] for expert in range(experts)] for layer in layers]
    longest = max((len(found) for layer in places for found in layer), default=0)
    return Placement(
        physical_to_logical=layers,
        logical_to_physical=[[found + [-1] * (longest - len(found)) for found in layer] for layer in places],
        replica_counts=[[len(found) for found in layer] for layer in places],
    )


def balanced_packing(weight: Sequence[float], num_packs: int) -> list[list[int]]:
    """Items into packs of equal number: heaviest first, each into the lightest pack that has room."""
    per_pack = len(weight) // num_packs
    if per_pack == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [0.0] * num_packs
    for item in sorted(range(len(weight)), key=lambda item: -weight[item]):
        pack = min((pack for pack in range(num_packs) if len(packs[pack]) < per_pack), key=lambda pack: loads[pack])
        packs[pack].append(item)
        loads[pack] += weight[item]
    return packs


def replicate_experts(weight: Sequence[float], num_replicas: int) -> list[int]:
    """The experts of `num_replicas` copies: one of each, then one more at a time of whichever has the largest load per copy."""
    counts = [1] * len(weight)
    copies = list(range(len(weight)))
    for _ in range(num_replicas - len(weight)):
        busiest = max(range(len(weight)), key=lambda expert: weight[expert] / counts[expert])
        counts[busiest] += 1
        copies.append(busiest)
    return copies


def _place(loads: list[float], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> list[int]:
    """One layer: groups to nodes, copies inside each node, copies to its devices."""
    group_size = len(loads) // num_groups
    groups = [list(range(group * group_size, (group + 1) * group_size)) for group in range(num_groups)]
    placed = []
    for node in balanced_packing([sum(loads[expert] for expert in group) for group in groups], num_nodes):
        experts = [expert for group in node for expert in groups[group]]
        copies = replicate_experts([loads[expert] for expert in experts], num_replicas // num_nodes)
        counts = {local: copies.count(local) for local in set(copies)}
        share = [loads[experts[local]] / counts[local] for local in copies]
        for device in balanced_packing(share, num_gpus // num_nodes):
            placed += [experts[copies[copy]] for copy in device]
    return placed


def _check(weight: Sequence[Sequence[float]], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> int:
    """The number of experts; ValueError for what does not divide."""
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, it must be at least 1")
    lengths = {len(loads) for loads in weight}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("weight must have at least one layer, and each layer the load of every expert")
    (experts,) = lengths
    if not all(0 <= load < float("inf") for loads in weight for load in loads):
        raise ValueError("weight holds a load that is negative or not finite; give counts or moving averages of tokens")
    for name, size, of, whole in (
        ("num_groups", num_groups, "the number of experts", experts),
        ("num_nodes", num_nodes, "num_gpus", num_gpus),
        ("num_gpus", num_gpus, "num_replicas", num_replicas),
    ):
        if whole % size:
            raise ValueError(f"{name} is {size}, it must divide {of} ({whole})")
    if num_replicas < experts:
        raise ValueError(
            f"num_replicas is {num_replicas}, below the {experts} experts; use at least {-(-experts // num_gpus) * num_gpus}"
        )
    return experts
