"""`finback r1-zero`: GRPO on a base model by rules alone, or a run that is continued (R1 section 2.2)."""

from collections.abc import Sequence

from finback.commands.grpo import run
from finback.rl.config import R1_ZERO_TEMPLATE, GRPOConfig

REWARDS = ("finback.rewards.answers:exact_answer_tag", "finback.rewards.format:r1_zero_format")


def main(argv: Sequence[str]) -> int:
    """`finback r1-zero BASE --data FILE --out DIR`."""
    description = (
        "R1-Zero: GRPO on a base model, with R1's template and rules alone as rewards (an exact answer, and the form).\n"
        "Rows need a prompt and an answer. Continue a run with: finback r1-zero --resume DIR."
    )
    return run(argv, "r1-zero", description, GRPOConfig(model="", template=R1_ZERO_TEMPLATE, reward=REWARDS))
