"""Schedules: the published table and step counts, and what every schedule must be over random sizes."""

from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.parallel.schedule import (
    SCHEDULES,
    Action,
    Costs,
    Kind,
    Schedule,
    dualpipe,
    dualpipe_v,
    interleaved,
    kind_counts,
    one_f_one_b,
    simulate,
    zb1p,
)

# A forward takes as long as an input gradient, and weight gradients are not longer: where the published table is exact.
COSTS = [Costs(), Costs(overlapped=2.5), Costs(1.0, 1.0, 0.25), Costs(2.0, 2.0, 1.5, overlapped=4.75)]


def table(name: str, stages: int, costs: Costs) -> float:
    """V3 section 3.2.1, table 2, written out again."""
    forward, backward, weight = costs.forward, costs.backward, costs.backward_weight
    pair = costs.of(Kind.OVERLAPPED)
    return {
        "one_f_one_b": (stages - 1) * (forward + backward),
        "zb1p": (stages - 1) * (forward + backward - 2 * weight),
        "dualpipe": (stages / 2 - 1) * (pair + backward - 3 * weight),
        "dualpipe_v": (stages / 2 - 1) * (pair + backward - 3 * weight),
    }[name]


@pytest.mark.parametrize("costs", COSTS, ids=str)
@pytest.mark.parametrize("name", ["one_f_one_b", "zb1p", "dualpipe", "dualpipe_v"])
def test_the_published_table_over_a_grid(name: str, costs: Costs) -> None:
    for stages, microbatches in ((2, 4), (2, 10), (4, 8), (4, 14), (6, 12), (8, 16), (8, 20), (16, 36)):
        schedule = SCHEDULES[name](stages, microbatches)
        result = simulate(schedule, costs)
        assert len(schedule) == (stages // 2 if name == "dualpipe_v" else stages)
        assert max(result.bubbles) == pytest.approx(table(name, stages, costs), abs=1e-9)
        assert max(result.peak_live_activations) == (stages + 1 if name.startswith("dualpipe") else stages)
        assert set(result.parameter_copies) == {2 if name.startswith("dualpipe") else 1}
        assert result.makespan == pytest.approx(result.busy[0] + result.bubbles[0])


def test_one_f_one_b_of_any_costs_has_the_published_bubble() -> None:
    costs = Costs(1.0, 2.7, 0.3)
    assert simulate(one_f_one_b(5, 9), costs).bubbles == pytest.approx([4 * 4.0] * 5)


def test_bubbles_do_not_grow_with_microbatches() -> None:
    for name in ("one_f_one_b", "zb1p", "dualpipe", "dualpipe_v"):
        first, second = (simulate(SCHEDULES[name](8, count), Costs(overlapped=2.5)) for count in (16, 64))
        assert first.bubbles == pytest.approx(second.bubbles)
        assert first.peak_live_activations == second.peak_live_activations


def letters(actions: list[Action]) -> list[tuple[str, int]]:
    """Kind and phase: for forwards and backwards the place of their stage, for a pair both."""
    return [
        (action.kind.value, action.chunk if action.backward is None else 10 * action.chunk + action.backward.chunk)
        for action in actions
    ]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_eight_steps_of_the_open_schedule_at_the_published_size(rank: int) -> None:
    """8 ranks, 20 micro-batches, the nearer half: the steps written out by hand from their counts."""
    outward, inward, steady = [(3, 1, 3), (2, 2, 4), (1, 3, 5), (0, 4, 6)][rank]
    expected = [("F", 0)] * (2 * outward) + [("F", 0), ("F", 1)] * inward + [("I", 1), ("W", 1), ("F", 1)] * outward
    main = [("F&B", 1), ("F&B", 10)] * steady
    if rank == 3:
        main = [("F", 0), ("B", 1), *main[1:]]
    expected += main + [("B", 1), ("F&B", 10)] * outward
    ends = [[("B", 1), ("I", 0)], [("B", 1), ("B", 0), ("I", 1), ("I", 0)]][rank] if rank < 2 else None
    if rank == 2:
        ends = [("B", 1), ("B", 0), ("B", 1), ("I", 0), ("I", 1), ("I", 0)]
    if rank == 3:
        ends = [("B", 1), ("B", 0)] * 2 + [("I", 1), ("I", 0)] * 2
    assert ends is not None
    found = letters(dualpipe(8, 20)[rank])
    assert found[: len(expected) + len(ends)] == expected + ends
    rest = [kind for kind, _ in found[len(expected) + len(ends) :]]
    assert rest == ["W", "I"] * outward + ["W"] * inward


def test_the_two_halves_of_dualpipe_mirror_each_other() -> None:
    schedule = dualpipe(8, 20)
    for rank in range(4):
        near, far = schedule[rank], schedule[7 - rank]
        assert [action.kind for action in near] == [action.kind for action in far]
        assert [(a.stage, a.microbatch) for a in near] == [(a.stage, (a.microbatch + 10) % 20) for a in far]
        assert [action.chunk for action in near] == [1 - action.chunk for action in far]


def test_dualpipe_v_has_the_counts_of_the_open_code() -> None:
    ranks, chunks = 4, 10
    for rank, actions in enumerate(dualpipe_v(2 * ranks, chunks)):
        runs = [(kind, len(list(group))) for kind, group in groupby(letters(actions))]
        # The forwards of step 1, and the first of step 2 after them.
        assert runs[0] == (("F", 0), 2 * (ranks - rank - 1) + 1)
        counts = kind_counts(actions)
        pairs = 2 * (chunks - 2 * ranks + rank + 1) + (ranks - rank - 1) - (rank == ranks - 1)
        assert counts[Kind.OVERLAPPED] == pairs
        assert counts[Kind.BACKWARD_INPUT] == counts[Kind.BACKWARD_WEIGHT] == 2 * (ranks - rank - 1) + rank + 1


def sizes(name: str) -> st.SearchStrategy[tuple[int, int]]:
    halves = st.integers(1, 6)
    return {
        "one_f_one_b": st.tuples(st.integers(1, 9), st.integers(1, 20)),
        "zb1p": st.tuples(st.integers(1, 9), st.integers(1, 20)),
        "interleaved": st.tuples(st.integers(1, 6), st.integers(1, 4)).map(lambda pair: (pair[0], pair[0] * pair[1])),
        "dualpipe": st.tuples(halves, st.integers(0, 8)).map(lambda pair: (2 * pair[0], 4 * pair[0] + 2 * pair[1])),
        "dualpipe_v": st.tuples(halves, st.integers(0, 9)).map(lambda pair: (2 * pair[0], 2 * pair[0] + pair[1])),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=25)
@given(data=st.data())
def test_every_schedule_runs_whole_at_any_size_and_cost(name: str, data: st.DataObject) -> None:
    """`simulate` refuses what is incomplete, crosses messages or waits for ever, so that it returns is most of the proof."""
    stages, microbatches = data.draw(sizes(name))
    time = st.floats(0.1, 3.0)
    costs = Costs(data.draw(time), data.draw(time), data.draw(time), data.draw(st.none() | time), data.draw(st.floats(0.0, 1.0)))
    schedule = SCHEDULES[name](stages, microbatches)
    result = simulate(schedule, costs)
    for actions, spans, busy in zip(schedule, result.timeline, result.busy, strict=True):
        assert busy == pytest.approx(sum(costs.of(action.kind) for action in actions))
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert min(result.bubbles) >= -1e-9
    forwards = sum(part.kind == Kind.FORWARD for actions in schedule for action in actions for part in action.parts)
    assert forwards == microbatches * stages * (2 if name == "interleaved" else 1)
    assert sum(result.parameter_copies) == stages * (2 if name in ("interleaved", "dualpipe") else 1)


def start_times(schedule: Schedule, result_costs: Costs) -> dict[tuple[str, int, int], tuple[float, float, int]]:
    timeline = simulate(schedule, result_costs).timeline
    return {
        (part.kind.value, part.microbatch, part.stage): (*span, rank)
        for rank, (actions, spans) in enumerate(zip(schedule, timeline, strict=True))
        for action, span in zip(actions, spans, strict=True)
        for part in action.parts
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_starts_before_what_it_needs(name: str) -> None:
    costs = Costs(1.0, 1.2, 0.7, send=0.3)
    times = start_times(SCHEDULES[name](4, 12), costs)
    for (kind, microbatch, stage), (start, _, rank) in times.items():
        if kind == "F" and stage:
            _, end, source = times["F", microbatch, stage - 1]
            assert start >= end + (costs.send if source != rank else 0) - 1e-9
        if kind in "BI":
            assert start >= times["F", microbatch, stage][1] - 1e-9
            above = times.get(("B", microbatch, stage + 1)) or times.get(("I", microbatch, stage + 1))
            if above:
                assert start >= above[1] + (costs.send if above[2] != rank else 0) - 1e-9
        if kind == "W":
            assert start >= times["I", microbatch, stage][1] - 1e-9


def test_zb1p_never_holds_more_than_1f1b() -> None:
    assert max(simulate(zb1p(8, 24)).peak_live_activations) == simulate(one_f_one_b(8, 24)).peak_live_activations[0]


def test_interleaving_divides_the_bubble_by_the_chunks() -> None:
    whole = simulate(one_f_one_b(4, 8), Costs()).makespan
    for chunks in (2, 4):
        part = Costs(1 / chunks, 1 / chunks, 1 / chunks)
        result = simulate(interleaved(4, 8, chunks), part)
        assert result.bubbles == pytest.approx([9 / chunks] * 4)
        assert result.makespan < whole


def test_a_slow_stage_sets_the_pace() -> None:
    """1F1B's last stage alternates forward and backward without waiting, once filled: with factor 3 it is busy throughout."""
    costs = Costs(1.0, 1.0, 1.0, stage_scale=(1.0, 1.0, 3.0))
    result = simulate(one_f_one_b(3, 10), costs)
    assert result.busy == [30.0, 30.0, 90.0]
    assert result.bubbles[2] == pytest.approx(2 * (1.0 + 2.0))  # two stages before it on the way in, and after it on the way out
    assert simulate(one_f_one_b(3, 10), Costs(stage_scale=(1.0,) * 3)) == simulate(one_f_one_b(3, 10))


def test_a_pair_is_stretched_by_both_of_its_stages() -> None:
    pair = Action(Kind.OVERLAPPED, 0, 1, 0, Action(Kind.BACKWARD, 1, 0))
    costs = Costs(1.0, 1.0, 1.0, overlapped=2.5, stage_scale=(3.0, 1.5))
    assert costs.of_action(pair) == pytest.approx(2.5 * (1.0 * 1.5 + 2.0 * 3.0) / 3.0)
    assert costs.of_action(pair.parts[1]) == 6.0
    assert Costs(1.0, 1.0, 1.0, overlapped=2.5).of_action(pair) == 2.5


def test_a_factor_for_each_stage() -> None:
    with pytest.raises(ValueError, match="stage_scale has 2 factors for 3 stages; give one for each"):
        simulate(one_f_one_b(3, 4), Costs(stage_scale=(1.0, 2.0)))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["forward", "backward_input", "backward_weight", "overlapped", "send"])
def test_costs_that_are_no_times_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"costs: {name} is {value}, it must be a finite number of at least 0"):
        Costs(**{name: value})
    with pytest.raises(ValueError, match=f"costs: stage_scale is {value}, it must be a finite number of at least 0"):
        Costs(stage_scale=(1.0, value))


def test_a_schedule_that_takes_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="costs: forward, backward_input and backward_weight are all 0; give one of them a time"):
        Costs(0.0, 0.0, 0.0, send=1.0)
    assert simulate(one_f_one_b(2, 2), Costs(1.0, 0.0, 0.0)).makespan == 3.0


def test_micro_batches_and_stages_count_from_zero() -> None:
    schedule = one_f_one_b(1, 2)
    schedule[0] = [replace(action, microbatch=action.microbatch - 1) for action in schedule[0]]
    with pytest.raises(ValueError, match="rank 0, F of micro-batch -1 on stage 0: micro-batches and stages count from 0"):
        simulate(schedule)
    schedule = [[replace(action, stage=action.stage - 1) for action in actions] for actions in one_f_one_b(2, 1)]
    with pytest.raises(ValueError, match="rank 0, F of micro-batch 0 on stage -1: micro-batches and stages count from 0"):
        simulate(schedule)


def test_a_deadlock_is_found() -> None:
    schedule = one_f_one_b(2, 2)
    schedule[0] = [schedule[0][2], *schedule[0][:2], *schedule[0][3:]]  # rank 0 wants a gradient before its first forward
    with pytest.raises(ValueError, match=r"deadlock.*rank 0 at B of micro-batch 0 on stage 0"):
        simulate(schedule, Costs())


def test_crossing_messages_are_found() -> None:
    schedule = one_f_one_b(2, 2)
    schedule[0][0], schedule[0][1] = schedule[0][1], schedule[0][0]
    with pytest.raises(ValueError, match="rank 1 waits for the forward of micro-batch 0 on stage 0 of rank 0, which sends"):
        simulate(schedule, Costs())


def test_incomplete_and_doubled_work_is_found() -> None:
    schedule = zb1p(2, 2)
    with pytest.raises(ValueError, match="the weight gradient of micro-batch 1 on stage 1 is missing"):
        simulate([schedule[0], schedule[1][:-1]], Costs())
    with pytest.raises(ValueError, match="the forward of micro-batch 0 on stage 0 is computed twice, on ranks 0 and 0"):
        simulate([[schedule[0][0], *schedule[0]], schedule[1]], Costs())
    moved = schedule[1].pop()
    with pytest.raises(ValueError, match="on different ranks"):
        simulate([[*schedule[0], moved], schedule[1]], Costs())
    with pytest.raises(ValueError, match="a pair, and only a pair"):
        simulate([[replace(schedule[0][0], kind=Kind.OVERLAPPED)]], Costs())
    with pytest.raises(ValueError, match="holds no action"):
        simulate([[]], Costs())


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("dualpipe", (7, 20), "num_stages is 7, it must be divisible by 2; the nearest is 8"),
        ("dualpipe", (8, 21), "num_microbatches is 21, it must be divisible by 2; the nearest is 22"),
        ("dualpipe", (8, 14), "num_microbatches is 14, it must be at least 2 x num_stages = 16; use 16"),
        ("dualpipe_v", (8, 7), "num_microbatches is 7, it must be at least num_stages = 8; use 8"),
        ("dualpipe_v", (5, 7), "num_stages is 5, it must be divisible by 2; the nearest is 6"),
        ("interleaved", (4, 10), r"it must be a multiple of num_stages \(4\); the nearest is 8"),
        ("one_f_one_b", (0, 3), "num_stages is 0, it must be at least 1"),
        ("zb1p", (3, 0), "num_microbatches is 0, it must be at least 1"),
    ],
)
def test_impossible_sizes_say_what_must_divide_what(name: str, sizes: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SCHEDULES[name](*sizes)
