"""`finback ppo`: PPO with a critic, to compare GRPO with, or a run that is continued."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from finback.commands.parse import directory_to_resume, parse_arguments
from finback.config import InputError
from finback.rl.config import PPOConfig


@dataclass(frozen=True)
class Arguments:
    """Words of `finback ppo MODEL`; the fields of the run's config stand beside them."""

    config: Annotated[PPOConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """Directory of the run: config, metrics, samples, checkpoints, report."""


def main(argv: Sequence[str]) -> int:
    """`finback ppo MODEL --data FILE --reward module:function[:weight] --out DIR`."""
    from_before = directory_to_resume(argv)
    if from_before is not None:
        from finback.rl.session import read_run_config

        _train(read_run_config(from_before, PPOConfig), Path(from_before), resume=True)
        return 0
    description = (
        "Train a model on prompts by PPO with a critic: the baseline that GRPO does without.\n"
        "Continue a run with: finback ppo --resume DIR."
    )
    default = Arguments(config=PPOConfig(model=""))
    arguments = parse_arguments(Arguments, argv, verb="ppo", description=description, default=default)
    if not arguments.config.model:
        raise InputError("the model's directory is missing; it comes first: finback ppo DIR ...; see finback ppo --help")
    if arguments.out is None:
        raise InputError("--out is missing; give a directory for the run")
    _train(arguments.config, arguments.out, resume=False)
    return 0


def _train(config: PPOConfig, out: Path, *, resume: bool) -> None:
    from finback.rl.ppo_train import ppo
    from finback.rl.report import write_report
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    checkpoint = ppo(config, out, resume=resume)
    write_report(out, verb="ppo")
    print(f"done: {checkpoint}")
    print(f"report: {out / 'report.md'}")
