"""`finback grpo`: reinforcement learning from rewards, or a run that is continued."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from finback.commands.parse import directory_to_resume, parse_arguments
from finback.config import InputError
from finback.rl.config import GRPOConfig


@dataclass(frozen=True)
class Arguments:
    """Words of `finback grpo MODEL`; the fields of the run's config stand beside them."""

    config: Annotated[GRPOConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Directory of the run: config, metrics, samples, checkpoints, report."""


def main(argv: Sequence[str]) -> int:
    """`finback grpo MODEL --data FILE --reward module:function[:weight] --out DIR`."""
    description = (
        "Train a model on prompts by GRPO: samples of its own, scored by rewards.\n"
        "Continue a run with: finback grpo --resume DIR."
    )
    return run(argv, "grpo", description, GRPOConfig(model=""))


def run(argv: Sequence[str], verb: str, description: str, default: GRPOConfig) -> int:
    """A verb that trains by GRPO from the fields of `default`."""
    from_before = directory_to_resume(argv)
    if from_before is not None:
        from finback.rl.session import read_run_config

        _train(read_run_config(from_before, GRPOConfig), Path(from_before), resume=True)
        return 0
    arguments = parse_arguments(Arguments, argv, verb=verb, description=description, default=Arguments(config=default))
    if not arguments.config.model:
        raise InputError(f"the model's directory is missing; it comes first: finback {verb} DIR ...; see finback {verb} --help")
    if arguments.out is None:
        raise InputError("--out is missing; give a directory for the run")
    _train(arguments.config, arguments.out, resume=False)
    return 0


def _train(config: GRPOConfig, out: Path, *, resume: bool) -> None:
    from finback.rl.report import write_report
    from finback.rl.train import grpo
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    checkpoint = grpo(config, out, resume=resume)
    write_report(out)
    print(f"done: {checkpoint}")
    print(f"report: {out / 'report.md'}")
