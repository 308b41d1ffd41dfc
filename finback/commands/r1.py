"""`finback r1`: the four stages of R1 on one's own base model and task, behind R1-Zero; `finback r1 small`: on sums, from nothing."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.config import InputError
from finback.presets import micro, nano_dense
from finback.recipes.config import R1_SMALL, QuickstartConfig, R1Config

SMALL = "small"


def main(argv: Sequence[str]) -> int:
    """`finback r1 BASE --data FILE --held-out FILE --out DIR`, or `finback r1 small --out DIR`; the same words continue an
    interrupted run. A directory of the name small is ./small."""
    return _small(argv[1:]) if argv and argv[0] == SMALL else _own(argv)


def _small(argv: Sequence[str]) -> int:
    config = parse_arguments(
        QuickstartConfig,
        argv,
        verb="r1 small",
        description="R1's whole story on sums, from nothing, in under two hours on two cores, with its claims checked.",
        default=R1_SMALL,
    )
    from finback.recipes.r1_small import r1_small
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    r1_small(config, micro(), nano_dense())
    return 0


def _own(argv: Sequence[str]) -> int:
    config = parse_arguments(
        R1Config,
        argv,
        verb="r1",
        description="Teach a base model to reason as R1 was taught, and a dense student after it; without a model of one's own: "
        "finback r1 small.",
        default=R1Config(base=""),
    )
    if not config.base:
        raise InputError("the base model's directory is missing; it comes first: finback r1 DIR ...; see finback r1 --help")
    if config.base == SMALL:
        raise InputError("the word small comes first: finback r1 small ...; a directory of that name is ./small")
    from finback.recipes.r1 import r1
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    r1(config)
    return 0
