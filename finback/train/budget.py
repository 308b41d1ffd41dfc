"""Where a run ends, in tokens. For a limit in steps or tokens that is arithmetic; for one in minutes it is a plan, made
from the speed so far and made again as time goes by.

The curves of the run depend on that end, so each plan is written down (`plan.json`) with the step from which it holds. A resumed run
takes the plans that were made before, and repeats the interrupted one bit for bit.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from finback.config import InputError
from finback.data.files import read_json, write_atomic
from finback.train.config import PretrainConfig
from finback.train.ramps import resolve_ramps, tokens_of_steps

PLAN_FILE = "plan.json"
_FIRST_PLAN = 0.02  # share of the time after which the first plan is made
_NEXT_PLAN = 0.25  # the next ones: when this share of what was left, in seconds or tokens, has passed
_LEAST_STEPS = 3  # timed steps before the first plan


@dataclass(frozen=True)
class Plan:
    """From `step` on the run is to end at `total_tokens`; None: not known yet. Made at `tokens` tokens and `seconds` of training."""

    step: int
    tokens: int
    seconds: float
    total_tokens: int | None


def fixed_total_tokens(config: PretrainConfig) -> int | None:
    """The tokens at which a run of so many steps or tokens ends; None for one of so many minutes."""
    if config.steps is None:
        return config.tokens
    return tokens_of_steps(resolve_ramps(config, None), steps=config.steps, sequence_length=config.sequence_length)


def next_plan(plans: list[Plan], *, step: int, tokens: int, seconds: float, limit_seconds: float) -> Plan | None:
    """The plan to be made before step `step + 1`, if one is due. `plans` are those made so far, oldest first.

    The first entry marks the end of step 1, whose time says nothing. From then on the speed since the last plan is taken to last.
    """
    if step < 1:
        return None
    if not plans:
        return Plan(step, tokens, seconds, None)
    last = plans[-1]
    if step <= last.step:
        return None  # a resumed run on its way to where it had been: the plans of then hold
    if last.total_tokens is None:
        due = step >= last.step + _LEAST_STEPS and seconds >= _FIRST_PLAN * limit_seconds
    else:
        # By the clock, so that a run that has become slower is shortened in time; by tokens, lest a faster one ends early.
        due = seconds >= _next_mark(last.seconds, limit_seconds) or tokens >= _next_mark(last.tokens, last.total_tokens)
    if not due and seconds < limit_seconds:
        return None
    # A resumed run can be younger than the last plan says: what it repeated after the checkpoint took its time twice.
    passed = seconds - last.seconds
    speed = (tokens - last.tokens) / passed if passed > 0 else tokens / max(seconds, 1e-9)
    return Plan(step, tokens, seconds, tokens + max(0, int(speed * (limit_seconds - seconds))))


def _next_mark(last: float, end: float) -> float:
    return last + max(_NEXT_PLAN * (end - last), _FIRST_PLAN * end)


def planned_total(plans: list[Plan], step: int) -> int | None:
    """The end in tokens that holds for step `step + 1`: what the newest plan made at or before `step` says."""
    totals = [plan.total_tokens for plan in plans if plan.step <= step]
    return totals[-1] if totals else None


def read_plans(directory: Path) -> list[Plan]:
    """The plans of a run so far, oldest first."""
    path = directory / PLAN_FILE
    if not path.exists():
        return []
    try:
        return [Plan(**entry) for entry in read_json(path)["plans"]]
    except (KeyError, TypeError):
        raise InputError(f"{path} is no list of plans; remove it to have the end of the run planned again") from None


def write_plans(directory: Path, plans: list[Plan]) -> None:
    write_atomic(directory / PLAN_FILE, json.dumps({"plans": [asdict(plan) for plan in plans]}, indent=2) + "\n")
