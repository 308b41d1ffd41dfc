"""`finback judge`: keep rows, or make preference pairs, by a judge."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.recipes.sampling_config import JudgeConfig


def main(argv: Sequence[str]) -> int:
    """`finback judge FILE --judge URL-or-DIR-or-RULE --out FILE.jsonl [--make pairs ...]`; the same words continue after a stop."""
    config = parse_arguments(
        JudgeConfig,
        argv,
        verb="judge",
        description="Keep the rows that a judge finds good, or make preference pairs of responses. The same words continue an "
        "interrupted run.",
    )
    from finback.recipes.judge_filter import judge

    judge(config)
    return 0
