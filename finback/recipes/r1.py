"""The R1 ladder on one's own base model and task, as one command that can be interrupted (R1 section 2)."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from finback.config import InputError
from finback.data.files import write_atomic
from finback.eval.contamination import occurrences
from finback.model.checkpoint import open_checkpoint
from finback.recipes import judging, ladder
from finback.recipes.config import LadderConfig, R1Config
from finback.recipes.ladder_report import curves, ladder_table, rises
from finback.recipes.stages import Run, Stage, copy_model, file_hash, open_run, run_or_skip, stage_times
from finback.rewards.reward import load_rewards
from finback.rl.config import GRPOConfig
from finback.rl.model_rewards import check_reward_model
from finback.train.sft_config import SFTConfig

_NOT_SETTINGS = ("out", "fresh")


def r1(config: R1Config) -> Path:
    """Run the ladder, or what is left of it, in `config.out`; returns the directory with the finished model.

    Raises:
        InputError: a field, a row or a directory is wrong, or a stage did not improve what it must.
        OSError: the disk is full; what was finished stays, and the next call goes on from there.
        KeyboardInterrupt: after Ctrl-C; a stage that trains has saved before.
    """
    check_files(config)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    run = open_run(Path(config.out), "r1", settings, fresh=config.fresh)
    stages = r1_stages(config)
    run_or_skip(run, stages, f"finback r1 {config.base} ... --out {run.directory}, with the same fields")
    print(f"\nTalk with it:            finback chat {run.directory / 'final'}")
    print(f"Read what happened:      {run.directory / 'report.md'}")
    return run.directory / "final"


def check_problems(name: str, file: str, reward: Sequence[str]) -> None:
    """InputError if the field `name` does not name a .jsonl file of rows with a prompt and, without a `reward`, an answer."""
    needed = ("prompt",) if reward else ("prompt", "answer")
    words = "a prompt, a text" if reward else "a prompt and an answer, both texts"
    if not file:
        raise InputError(f"field {name} is missing; give a .jsonl file of rows with {words.partition(',')[0]}")
    _check_file(name, file)
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line) if line else dict.fromkeys(needed, "")
        except ValueError as error:
            raise InputError(f"{file}, line {number} is not JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in needed):
            raise InputError(f"{file}, line {number}: the row needs {words}")


def _check_file(name: str, file: str) -> None:
    if not file.endswith(".jsonl") or not Path(file).is_file():
        raise InputError(f"field {name} names {file}, which is no .jsonl file that can be read")


def check_files(config: R1Config) -> None:
    """InputError for what cannot be read, before anything is written."""
    check_problems("data", config.data, config.reward)
    check_problems("held_out", config.held_out, config.reward)
    for name in ("general_rewards", "reward_model"):
        if getattr(config, name) and not config.general_prompts:
            raise InputError(f"field {name} judges answers to general prompts, and there are none; give general_prompts")
    for spec in config.reward_model:
        check_reward_model(spec)
    if rewards := (*config.reward, *config.general_rewards):
        load_rewards(rewards)
    for name in ("general", "general_prompts"):
        if getattr(config, name):
            _check_file(name, getattr(config, name))
    open_checkpoint(Path(config.base))
    if config.student:
        open_checkpoint(Path(config.student))


def r1_stages(config: R1Config) -> list[Stage]:
    """The recipe, in order; with a student, distillation comes last."""
    steps = r1_ladder(config)
    stages = [
        Stage("base", "The base", partial(base, config=config)),
        Stage("r1-zero", "R1-Zero: GRPO from the base", partial(ladder.r1_zero, ladder=steps)),
        Stage("cold-start", "Cold start: SFT", partial(ladder.cold_start, ladder=steps)),
        Stage("reasoning-rl", "Reasoning RL", partial(ladder.reasoning_rl, ladder=steps)),
        Stage("rejection-sft", "Rejection sampling, SFT", partial(ladder.rejection_sft, ladder=steps)),
        Stage("all-scenario-rl", "All-scenario RL", partial(ladder.all_scenario_rl, ladder=steps)),
    ]
    if config.student:
        stages.append(Stage("student", "Distillation", partial(ladder.student, ladder=steps)))
    return [*stages, Stage("report", "Report", partial(report, config=config))]


def r1_ladder(config: R1Config) -> LadderConfig:
    """The settings of every stage."""
    rl = GRPOConfig(
        model="",
        steps=config.zero_steps,
        prompts_per_step=config.prompts_per_step,
        num_generations=config.num_generations,
        minibatches=config.minibatches,
        max_completion_length=config.max_completion_length,
        lr=config.lr,
        final_lr=config.lr / 10,
        beta=config.beta,
    )
    sft = SFTConfig(lr=config.sft_lr, epochs=config.sft_epochs, batching="pad", chat_template=config.chat_template)
    return LadderConfig(
        prompts=Path(config.data),
        held_out={"held out": Path(config.held_out)},
        reward=config.reward,
        least_reward=config.least_reward,
        zero_template=config.template,
        general=Path(config.general) if config.general else None,
        general_prompts=Path(config.general_prompts) if config.general_prompts else None,
        general_rewards=config.general_rewards,
        reward_model=config.reward_model,
        zero=rl,
        cold_start=sft,
        reasoning=replace(rl, steps=config.reasoning_steps),
        rejection=sft,
        all_scenario=replace(rl, steps=config.all_scenario_steps, temperature=0.7),
        student=sft,
        cold_start_prompts=config.cold_start_prompts,
        rejection_prompts=config.rejection_prompts,
        student_prompts=config.student_prompts,
        gate=config.gate,
        eval_problems=config.eval_problems,
        eval_samples=config.eval_samples,
        eval_tokens=config.max_completion_length,
    )


def base(run: Run, config: R1Config) -> dict[str, Any]:
    """The models to start from, under their names in the run, and the hashes of the files: the lineage of all that follows."""
    copy_model(Path(config.base), run.directory / "base")
    if config.student:
        copy_model(Path(config.student), run.directory / "student-base")
    files = [file for file in (config.data, config.held_out, config.general, config.general_prompts) if file]
    weights = sorted((run.directory / "base").glob("*.safetensors"))
    facts = {"files": {os.path.abspath(file): file_hash(Path(file)) for file in files}}
    return facts | {"base": {file.name: file_hash(file) for file in weights}}


def report(run: Run, config: R1Config) -> dict[str, Any]:
    """`final/` and `report.md`."""
    copy_model(run.directory / "all-scenario-rl", run.directory / "final")
    table = ladder_table(run)
    print(table)
    sections = [
        ("The R1 ladder", table),
        ("What each stage added", rises(run)),
        ("Held-out problems in training texts", seen_problems(run, config)),
        *curves(run),
        ("Stages", stage_times(run)),
    ]
    text = "\n\n".join(f"## {heading}\n\n{body}" for heading, body in sections)
    write_atomic(run.directory / "report.md", f"# {run.directory.resolve().name}\n\n{text}\n")
    return {}


def seen_problems(run: Run, config: R1Config) -> str:
    """In words, how many held-out problems stand in a text that a stage was trained on; the base's own corpus is not known here."""
    texts = _lines([Path(config.data), *sorted((run.directory / "data").glob("*.jsonl"))])
    task = judging.task(r1_ladder(config), "held out", ladder.read_rows(Path(config.held_out)))
    found = occurrences(task, texts)
    return f"{len(found)} of {len(task.examples)} problems occur in the {len(texts):,} rows of training."


def _lines(files: Sequence[Path]) -> list[str]:
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
