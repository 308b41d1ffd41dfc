"""`finback reward-model`: train a reward model on pairs or labels, or continue a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from finback.commands.parse import directory_to_resume, parse_arguments
from finback.config import InputError
from finback.train.reward_model_config import RewardModelConfig

_DESCRIPTION = """Train a reward model, or continue a run with: finback reward-model --resume DIR.
Rows of the data are {"prompt", "chosen", "rejected"} (pairwise) or {"prompt", "completion", "label"} (pointwise)."""


@dataclass(frozen=True)
class Arguments:
    """Words of `finback reward-model MODEL_DIR`; the fields of the run's config stand beside them."""

    model_dir: Annotated[str, tyro.conf.Positional]
    """Hugging Face directory of the language model to start from, best a fine-tuned one."""
    config: Annotated[RewardModelConfig, tyro.conf.arg(name="")] = field(default_factory=RewardModelConfig)
    out: Path | None = None
    """Directory of the run: config, metrics, checkpoints, report."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 when the run has reached its end."""
    from_before = directory_to_resume(argv)
    if from_before is not None:
        _resume(from_before)
        return 0
    arguments = parse_arguments(Arguments, argv, verb="reward-model", description=_DESCRIPTION)
    if arguments.out is None:
        raise InputError("--out is missing; give a directory for the run")
    if not arguments.config.data:
        raise InputError("--data is missing; give .jsonl or .parquet files with pairs or labels")
    from finback.train.reward_model import train_reward_model
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    _tell_end(train_reward_model(arguments.model_dir, arguments.config, arguments.out))
    return 0


def _resume(directory: str) -> None:
    from finback.train.reward_model import read_reward_run, train_reward_model
    from finback.train.session import keep_freed_memory

    base, config = read_reward_run(directory)
    keep_freed_memory()
    _tell_end(train_reward_model(base, config, directory, resume=True))


def _tell_end(checkpoint: Path) -> None:
    print(f"done: {checkpoint}")
    print(f"report: {checkpoint.parents[1] / 'report.md'}")
