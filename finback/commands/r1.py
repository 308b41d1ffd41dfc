"""`finback r1`: the four stages of R1 on one's own base model and task, behind R1-Zero."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.config import InputError
from finback.recipes.config import R1Config


def main(argv: Sequence[str]) -> int:
    """`finback r1 BASE --data FILE --held-out FILE --out DIR`; the same words continue an interrupted run."""
    config = parse_arguments(
        R1Config,
        argv,
        verb="r1",
        description="Teach a base model to reason as R1 was taught, and a dense student after it.",
        default=R1Config(base=""),
    )
    if not config.base:
        raise InputError("the base model's directory is missing; it comes first: finback r1 DIR ...; see finback r1 --help")
    from finback.recipes.r1 import r1
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    r1(config)
    return 0
