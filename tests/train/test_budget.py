"""Where runs end: exactly for steps and tokens, near the asked time for minutes, and the same again after a resume."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.presets import tiny
from finback.train.budget import Plan, fixed_total_tokens, next_plan, planned_total, read_plans, write_plans

STEP_TOKENS = 100


def drive(speeds: list[float], limit: float, plans: list[Plan], first: tuple[int, int, float] = (0, 0, 0.0)) -> list[int | None]:
    """Run the loop's bookkeeping: step i takes STEP_TOKENS / speeds[i]; returns the total that held for each step."""
    step, tokens, seconds = first
    totals = []
    while True:
        total = planned_total(plans, step)
        if (total is not None and tokens >= total) or step >= len(speeds):
            return totals
        totals.append(total)
        seconds += STEP_TOKENS / speeds[step]
        step, tokens = step + 1, tokens + STEP_TOKENS
        plan = next_plan(plans, step=step, tokens=tokens, seconds=seconds, limit_seconds=limit)
        if plan is not None:
            plans.append(plan)


def elapsed(speeds: list[float], steps: int) -> float:
    return sum(STEP_TOKENS / speed for speed in speeds[:steps])


def test_steps_and_tokens_are_arithmetic() -> None:
    config = tiny()
    per_step = config.global_batch_size * config.sequence_length
    assert fixed_total_tokens(replace(config, steps=7)) == 7 * per_step
    assert fixed_total_tokens(replace(config, steps=None, tokens=12345)) == 12345
    assert fixed_total_tokens(replace(config, steps=None, minutes=1.0)) is None


def test_a_steady_run_is_planned_once_it_is_known_and_ends_in_time() -> None:
    speeds = [10.0] + [1000.0] * 5000  # the first step warms everything up
    plans: list[Plan] = []
    totals = drive(speeds, 300.0, plans)
    assert totals[:2] == [None, None]
    assert totals[-1] is not None
    assert elapsed(speeds, len(totals)) == pytest.approx(300, abs=1)
    known = [total for total in totals if total is not None]
    assert max(known) - min(known) <= STEP_TOKENS  # a steady speed leaves the plan alone
    assert totals.index(known[0]) < 0.04 * len(totals)


@given(
    st.lists(st.floats(200, 2000), min_size=4, max_size=4),
    st.floats(30, 300),
)
def test_a_run_whose_speed_changes_still_ends_near_its_time(quarters: list[float], limit: float) -> None:
    speeds: list[float] = []
    seconds = 0.0
    while seconds < 2 * limit:  # a new speed after every quarter of the time, the last one stays
        speeds.append(quarters[min(3, int(4 * seconds / limit))])
        seconds += STEP_TOKENS / speeds[-1]
    totals = drive(speeds, limit, [])
    assert 0.9 * limit - 1 <= elapsed(speeds, len(totals)) <= 1.05 * limit + 1


def test_a_resumed_run_takes_the_plans_that_were_made(tmp_path: Path) -> None:
    speeds = [10.0] + [1000.0] * 300 + [400.0] * 5000
    plans: list[Plan] = []
    whole = drive(speeds, 60.0, plans)
    write_plans(tmp_path, plans[:4])  # killed after the fourth plan ...
    known = read_plans(tmp_path)
    assert known == plans[:4]
    resume_at = plans[2].step - 1  # ... with a checkpoint from before the third
    slow = [speed / 3 for speed in speeds]  # and the new machine is slower
    first = (resume_at, resume_at * STEP_TOKENS, elapsed(speeds, resume_at))
    resumed = drive(slow, 60.0, known, first)
    until = plans[3].step + 1 - resume_at
    assert resumed[:until] == whole[resume_at : resume_at + until]
    assert known[:4] == plans[:4]
    assert len(known) > 4


def test_time_that_is_up_ends_the_run_at_once() -> None:
    plans = [Plan(1, 100, 1.0, None), Plan(5, 500, 2.0, 10_000)]
    plan = next_plan(plans, step=6, tokens=600, seconds=61.0, limit_seconds=60.0)
    assert plan is not None
    assert plan.total_tokens == 600


def test_a_damaged_plan_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"plans": [{"step": 1}]}')
    with pytest.raises(InputError, match=r"plan\.json is no list of plans; remove it"):
        read_plans(tmp_path)
