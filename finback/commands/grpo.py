"""`finback grpo`: reinforcement learning from rewards, or a run that is continued."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from finback.commands.parse import parse_arguments
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
    if any(word.split("=")[0] == "--resume" for word in argv):
        words = [word for argument in argv for word in argument.split("=", 1)]
        if len(words) != 2 or words[0] != "--resume":
            raise InputError("--resume DIR stands alone: a run is continued with the fields that it was started with")
        from finback.rl.session import read_run_config

        _train(read_run_config(words[1]), Path(words[1]), resume=True)
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
