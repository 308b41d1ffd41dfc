"""`finback sft`: fine-tune a model on conversations or completions, or continue a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from finback.commands.parse import directory_to_resume, parse_arguments
from finback.config import InputError
from finback.train.sft_config import SFTConfig

_DESCRIPTION = """Fine-tune a model on completions, or continue a run with: finback sft --resume DIR.
Rows of the data are {"messages": [{"role", "content", ("reasoning_content")}, ...]} or {"prompt", "completion"}."""


@dataclass(frozen=True)
class Arguments:
    """Words of `finback sft MODEL_DIR`; the fields of the run's config stand beside them."""

    model_dir: Annotated[str, tyro.conf.Positional]
    """Hugging Face directory of the model to start from."""
    config: Annotated[SFTConfig, tyro.conf.arg(name="")] = field(default_factory=SFTConfig)
    out: Path | None = None
    """Directory of the run: config, metrics, checkpoints, report."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code is 0 when the run has reached its end."""
    from_before = directory_to_resume(argv)
    if from_before is not None:
        _resume(from_before)
        return 0
    arguments = parse_arguments(Arguments, argv, verb="sft", description=_DESCRIPTION)
    if arguments.out is None:
        raise InputError("--out is missing; give a directory for the run")
    if not arguments.config.data:
        raise InputError("--data is missing; give .jsonl or .parquet files with messages, or with prompt and completion")
    from finback.train.session import keep_freed_memory
    from finback.train.sft import sft

    keep_freed_memory()
    _tell_end(sft(arguments.model_dir, arguments.config, arguments.out))
    return 0


def _resume(directory: str) -> None:
    from finback.train.session import keep_freed_memory
    from finback.train.sft import read_sft_run, sft

    base, config = read_sft_run(directory)
    if base is None:
        raise InputError(f"the run in {directory} was started from Python with samples in memory; resume it from there")
    keep_freed_memory()
    _tell_end(sft(base, config, directory, resume=True))


def _tell_end(checkpoint: Path) -> None:
    print(f"done: {checkpoint}")
    print(f"report: {checkpoint.parents[1] / 'report.md'}")
