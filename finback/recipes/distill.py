"""Distillation as one command: a teacher answers, what is verified teaches a student of any family (R1 section 2.4)."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from finback.config import InputError
from finback.data.files import write_atomic
from finback.model.checkpoint import open_checkpoint
from finback.recipes import ladder
from finback.recipes.config import DistillConfig, LadderConfig
from finback.recipes.ladder_report import comparison_table
from finback.recipes.r1 import check_problems
from finback.recipes.stages import Run, Stage, copy_model, open_run, run_or_skip, stage_times
from finback.rewards.reward import load_rewards
from finback.train.sft_config import SFTConfig

_NOT_SETTINGS = ("out", "fresh")


def distill(config: DistillConfig) -> Path:
    """Run the recipe, or what is left of it, in `config.out`; returns the directory with the student.

    Raises:
        InputError: a field, a row or a directory is wrong, or the teacher answers too little that is right.
        OSError: the disk is full; what was finished stays, and the next call goes on from there.
    """
    if not config.student:
        raise InputError("field student is missing; give the directory of the model that is to be taught")
    check_problems("data", config.data, config.reward)
    check_problems("held_out", config.held_out, config.reward)
    if config.reward:
        load_rewards(config.reward)
    for directory in (config.teacher, config.student):
        open_checkpoint(Path(directory))
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    run = open_run(Path(config.out), "distill", settings, fresh=config.fresh)
    steps = LadderConfig(
        prompts=Path(config.data),
        held_out={"held out": Path(config.held_out)},
        reward=config.reward,
        least_reward=config.least_reward,
        zero_template=config.template,
        student=SFTConfig(lr=config.lr, epochs=config.epochs, batching="pad", chat_template=config.chat_template),
        student_prompts=config.prompts,
        eval_problems=config.eval_problems,
        eval_samples=config.eval_samples,
        eval_tokens=config.max_completion_length,
    )
    stages = [
        Stage("teacher", "The teacher", partial(teacher, config=config, steps=steps)),
        Stage("student", "Distillation", partial(ladder.student, ladder=steps, teacher="teacher")),
        Stage("report", "Report", report),
    ]
    run_or_skip(run, stages, f"finback distill {config.teacher} ... --out {run.directory}, with the same fields")
    print(f"\nTalk with it:            finback chat {run.directory / 'student'}")
    print(f"Read what happened:      {run.directory / 'report.md'}")
    return run.directory / "student"


def teacher(run: Run, config: DistillConfig, steps: LadderConfig) -> dict[str, Any]:
    """Both models under their names in the run, and how good the teacher is."""
    copy_model(Path(config.teacher), run.directory / "teacher")
    copy_model(Path(config.student), run.directory / "student-base")
    return ladder.measure(run, steps, "teacher", ladder.CHAT)


def report(run: Run) -> dict[str, Any]:
    """`report.md`: teacher, student before, student after."""
    models: dict[str, Mapping[str, Any]] = {
        "teacher": run.facts("teacher")["results"],
        "student before": run.facts("student")["base"]["results"],
        "student": run.facts("student")["results"],
    }
    table = comparison_table(models)
    print(table)
    rows = f"{run.facts('student')['rows']} verified traces of the teacher were learnt from."
    parts = (f"# {run.directory.resolve().name}", table, rows, f"## Stages\n\n{stage_times(run)}")
    write_atomic(run.directory / "report.md", "\n\n".join(parts) + "\n")
    return {}
