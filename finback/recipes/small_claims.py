"""What the R1 paper says of its stages, held against the numbers of a small run: each claim with its numbers and its verdict."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finback.eval.statistics import paired_difference

LEAST_RISE, LEAST_GREEDY_RISE = 0.30, 0.15
MOST_MIXED, LEAST_FORM = 0.02, 0.95
LEAST_MIXED_BEFORE, MOST_LEFT = 0.10, 1 / 3
_LADDER = (
    "r1-zero",
    "r1-zero-language",
    "cold-start",
    "reasoning-rl",
    "rejection-sft",
    "all-scenario-rl",
    "student",
    "student-rl",
)

Numbers = Mapping[str, Any]


class Verdict(NamedTuple):
    """A claim, in words, what was measured, and whether it holds."""

    claim: str
    measured: str
    holds: bool


def claims(stages: Mapping[str, Any]) -> list[Verdict]:
    """The claims about a finished ladder, from the manifest's `stages`, all on its first set of held-out problems."""
    found = {name: _first(stages[name]) for name in _LADDER}
    base, student_base = _first(stages["r1-zero"]["base"]), _first(stages["student"]["base"])
    flops = (stages["student-rl"]["rl_flops"], stages["student-rl"]["distillation_flops"])
    return [
        _zero(base, found["r1-zero"]),
        _readable(found["r1-zero"], found["cold-start"]),
        _above(
            "reasoning RL is above the cold start", "reasoning-rl", found["reasoning-rl"], {"cold-start": found["cold-start"]}
        ),
        _above("the last model is the best of all", "all-scenario-rl", found["all-scenario-rl"], {"base": base, **found}),
        distillation_verdict(student_base, found["student"], found["student-rl"], *flops),
        _language(found["r1-zero"], found["r1-zero-language"]),
    ]


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table of the claims."""
    rows = (f"| {v.claim} | {v.measured} | {'yes' if v.holds else 'no'} |" for v in verdicts)
    return "| claim | measured | holds |\n|---|---|---|\n" + "\n".join(rows)


def _first(facts: Mapping[str, Any]) -> Numbers:
    numbers: Numbers = next(iter(facts["results"].values()))
    return numbers


def _zero(base: Numbers, zero: Numbers) -> Verdict:
    rise, greedy = _change(base, zero), zero["greedy"][0] - base["greedy"][0]
    return Verdict(
        f"R1-Zero: GRPO alone gains at least {100 * LEAST_RISE:.0f} points of pass@1 and {100 * LEAST_GREEDY_RISE:.0f} greedy",
        f"pass@1 {_points(rise)}, greedy {100 * greedy:+.1f}, pass@k {_share(base['pass_at_k'])} to {_share(zero['pass_at_k'])}",
        rise[0] >= LEAST_RISE and greedy >= LEAST_GREEDY_RISE,
    )


def _readable(zero: Numbers, cold: Numbers) -> Verdict:
    return Verdict(
        f"the cold start is readable: at most {MOST_MIXED:.0%} of its thoughts mix languages, at least {LEAST_FORM:.0%} are in form",
        f"mixed {cold['mixing_rate']:.1%} (R1-Zero {zero['mixing_rate']:.1%}), in form {cold['format_rate']:.1%} "
        f"(R1-Zero {zero['format_rate']:.1%}), pass@1 {_estimate(cold)} (R1-Zero {_estimate(zero)})",
        cold["mixing_rate"] <= MOST_MIXED and cold["format_rate"] >= LEAST_FORM,
    )


def _above(claim: str, name: str, numbers: Numbers, others: Mapping[str, Numbers]) -> Verdict:
    """Whether the interval of a model lies above those of all others."""
    rivals = {other: n for other, n in others.items() if other != name}
    best = max(rivals, key=lambda other: rivals[other]["pass_at_1"][2])
    return Verdict(
        f"{claim}, by more than the intervals",
        f"{name} {_estimate(numbers)}, {best} {_estimate(rivals[best])}; paired {_points(_change(rivals[best], numbers))}",
        bool(numbers["pass_at_1"][1] > rivals[best]["pass_at_1"][2]),
    )


def distillation_verdict(
    before: Numbers, distilled: Numbers, alone: Numbers, rl_flops: float, distillation_flops: float
) -> Verdict:
    """A small model learns more from a teacher's traces than by reinforcement learning of its own."""
    return Verdict(
        "the distilled student is above the same student under RL alone, which had at least as much compute",
        f"distilled {_estimate(distilled)}, RL alone {_estimate(alone)}, before {_estimate(before)}; RL had "
        f"{rl_flops / distillation_flops:.2f} times the FLOPs",
        bool(distilled["pass_at_1"][1] > alone["pass_at_1"][2] and rl_flops >= distillation_flops),
    )


def _language(without: Numbers, rewarded: Numbers) -> Verdict:
    before, after = without["mixing_rate"], rewarded["mixing_rate"]
    return Verdict(
        f"without a reward for one language at least {LEAST_MIXED_BEFORE:.0%} of the thoughts mix, with it at most a third of that",
        f"{before:.1%} without, {after:.1%} with it; its price in pass@1: {_points(_change(without, rewarded))}",
        before >= LEAST_MIXED_BEFORE and after <= MOST_LEFT * before,
    )


def _change(before: Numbers, after: Numbers) -> tuple[float, float, float]:
    value, low, high = paired_difference(before["scores"], after["scores"])
    return value, low, high


def _points(change: tuple[float, float, float]) -> str:
    return f"{100 * change[0]:+.1f} points ({100 * change[1]:+.1f} to {100 * change[2]:+.1f})"


def _estimate(numbers: Numbers) -> str:
    value, low, high = numbers["pass_at_1"]
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _share(estimate: Sequence[float]) -> str:
    return f"{estimate[0]:.1%}"
