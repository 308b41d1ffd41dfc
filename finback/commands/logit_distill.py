"""`finback logit-distill`: a student learns a teacher's probabilities, where both have one vocabulary, or a run is continued."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from finback.commands.parse import directory_to_resume, parse_arguments
from finback.config import InputError
from finback.recipes.logit_distill_config import LogitDistillConfig

_DESCRIPTION = """Teach a student the teacher's probabilities on its verified traces. Both need the same vocabulary.
Continue a run with: finback logit-distill --resume DIR."""


@dataclass(frozen=True)
class Arguments:
    """Words of `finback logit-distill TEACHER STUDENT`; the fields of the run's config stand beside them."""

    teacher: Annotated[str, tyro.conf.Positional]
    """Hugging Face directory of the model that is learnt from."""
    student: Annotated[str, tyro.conf.Positional]
    """Hugging Face directory of the model that learns; its tokenizer must be the teacher's."""
    config: Annotated[LogitDistillConfig, tyro.conf.arg(name="")] = field(default_factory=LogitDistillConfig)
    out: Path | None = None
    """Directory of the run: config, metrics, checkpoints, report, and student/ at the end."""


def main(argv: Sequence[str]) -> int:
    """`finback logit-distill TEACHER STUDENT --data FILE --out DIR [--distill-temperature T --top-k K ...]`."""
    from_before = directory_to_resume(argv)
    if from_before is not None:
        from finback.recipes.logit_distill import read_logit_run

        teacher, student, config = read_logit_run(from_before)
        _train(teacher, student, config, Path(from_before), resume=True)
        return 0
    arguments = parse_arguments(Arguments, argv, verb="logit-distill", description=_DESCRIPTION)
    if arguments.out is None:
        raise InputError("--out is missing; give a directory for the run")
    _train(arguments.teacher, arguments.student, arguments.config, arguments.out, resume=False)
    return 0


def _train(teacher: str, student: str, config: LogitDistillConfig, out: Path, *, resume: bool) -> None:
    from finback.recipes.logit_distill import logit_distill
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    print(f"the student: {logit_distill(teacher, student, config, out, resume=resume)}")
