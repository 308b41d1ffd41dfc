"""`finback logit-distill`: a student learns a teacher's probabilities, where both have one vocabulary."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.recipes.logit_distill_config import LogitDistillConfig


def main(argv: Sequence[str]) -> int:
    """`finback logit-distill TEACHER STUDENT --data FILE --out DIR [--distill-temperature T --top-k K ...]`."""
    config = parse_arguments(
        LogitDistillConfig,
        argv,
        verb="logit-distill",
        description="Teach a student the teacher's probabilities on its verified traces. Both need the same vocabulary.",
    )
    from finback.recipes.logit_distill import logit_distill
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    logit_distill(config)
    return 0
