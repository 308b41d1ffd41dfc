"""`finback distill`: teach a student by a teacher's verified answers."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.config import InputError
from finback.recipes.config import DistillConfig


def main(argv: Sequence[str]) -> int:
    """`finback distill TEACHER --student DIR --data FILE --held-out FILE --out DIR`; the same words continue an interrupted run."""
    config = parse_arguments(
        DistillConfig,
        argv,
        verb="distill",
        description="Fine-tune a student of any family on what a teacher answers rightly.",
        default=DistillConfig(teacher=""),
    )
    if not config.teacher:
        raise InputError(
            "the teacher's directory is missing; it comes first: finback distill DIR ...; see finback distill --help"
        )
    from finback.recipes.distill import distill
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    distill(config)
    return 0
