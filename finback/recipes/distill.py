"""Distillation as one command: a teacher answers, what is verified teaches a student of any family (R1 section 2.4); if wanted, beside
reinforcement learning on the same student alone, at equal compute (R1 section 4.1)."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from finback.config import InputError, ModelConfig
from finback.data.files import write_atomic
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.model.checkpoint import open_checkpoint
from finback.recipes import ablations, judging, ladder
from finback.recipes.config import DistillConfig, LadderConfig
from finback.recipes.ladder_report import comparison_table, curves
from finback.recipes.r1 import check_problems, check_template, seen_in_training
from finback.recipes.room import check_fine_tuning, check_reinforcement_learning, longest_prompt, trace_settings
from finback.recipes.small_claims import claims_table, distillation_verdict
from finback.recipes.stages import Run, Stage, copy_model, open_run, run_or_skip, stage_times
from finback.rl.config import GRPOConfig
from finback.train.sft_config import SFTConfig

_NOT_SETTINGS = ("out", "fresh", "micro_batch_tokens", "micro_batch_size", "recompute")  # what changes no result may change


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
    judging.check_own(config.reward, (judging.CHAT_FORMAT,), *([(judging.ZERO_FORMAT,)] if config.compare_rl else []))
    for directory in (config.teacher, config.student):
        open_checkpoint(Path(directory))
    if load_tokenizer(config.teacher).chat_template is None:
        raise InputError(f"field teacher: {config.teacher} has no chat template; a teacher is a chat model")
    student = check_template("student", config.student, config.chat_template)
    _check_room(config, student)
    stages = distill_stages(config)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    run = open_run(Path(config.out), "distill", settings, fresh=config.fresh)
    run_or_skip(run, stages, f"finback distill {config.teacher} ... --out {run.directory}, with the same fields")
    print(f"\nTalk with it:            finback chat {run.directory / 'student'}")
    print(f"Read what happened:      {run.directory / 'report.md'}")
    return run.directory / "student"


def _check_room(config: DistillConfig, student: Tokenizer) -> None:
    """InputError for a prompt that leaves no room for an answer, or a stage that does not fit into memory."""
    files, answer = [config.data, config.held_out], config.max_completion_length
    longest_prompt(files, load_tokenizer(config.teacher), (None,), ModelConfig.from_hf(config.teacher), answer)
    model = ModelConfig.from_hf(config.student)
    prompt = longest_prompt(files, student, (config.template, None), model, answer)
    check_fine_tuning(_sft(config), model, prompt + answer)
    if config.compare_rl:
        check_reinforcement_learning(_reinforcement_learning(config), model, prompt)


def _sft(config: DistillConfig) -> SFTConfig:
    return trace_settings(config, config.student, lr=config.lr, epochs=config.epochs)


def _reinforcement_learning(config: DistillConfig) -> GRPOConfig:
    return GRPOConfig(
        model="",
        prompts_per_step=config.prompts_per_step,
        num_generations=config.num_generations,
        minibatches=config.minibatches,
        max_completion_length=config.max_completion_length,
        lr=config.rl_lr,
        final_lr=config.rl_lr / 10,
        beta=config.beta,
        micro_batch_tokens=config.micro_batch_tokens,
    )


def distill_stages(config: DistillConfig) -> list[Stage]:
    """The recipe, in order."""
    steps = LadderConfig(
        prompts=Path(config.data),
        held_out={"held out": Path(config.held_out)},
        reward=config.reward,
        least_reward=config.least_reward,
        zero_template=config.template,
        student=_sft(config),
        student_prompts=config.prompts,
        eval_problems=config.eval_problems,
        eval_samples=config.eval_samples,
        eval_tokens=config.max_completion_length,
        gate="tell",
    )
    stages = [
        Stage("teacher", "The teacher", partial(teacher, config=config, steps=steps)),
        Stage("student", "Distillation", partial(ladder.student, ladder=steps, teacher="teacher")),
    ]
    if config.compare_rl:
        alone = _reinforcement_learning(config)
        work = partial(ablations.student_rl, ladder=steps, settings=alone, teacher="teacher", spare=config.rl_compute)
        stages.append(Stage("student-rl", "The same student by RL alone", work))
    return [*stages, Stage("report", "Report", partial(report, steps=steps))]


def teacher(run: Run, config: DistillConfig, steps: LadderConfig) -> dict[str, Any]:
    """Both models under their names in the run, and how good the teacher is."""
    copy_model(Path(config.teacher), run.directory / "teacher")
    copy_model(Path(config.student), run.directory / "student-base")
    return ladder.measure(run, steps, "teacher", ladder.CHAT)


def report(run: Run, steps: LadderConfig) -> dict[str, Any]:
    """`report.md`: teacher, student before, student after; where it was trained by reinforcement learning as well, what came of that,
    the compute of both, and whether the paper's claim holds."""
    distilled = run.facts("student")
    models: dict[str, Mapping[str, Any]] = {
        "teacher": run.facts("teacher")["results"],
        "student before": distilled["base"]["results"],
        "student": distilled["results"],
    }
    learnt = f"{distilled['rows']} verified traces of the teacher were learnt from."
    sections = [("Distillation", f"{comparison_table(models)}\n\n{learnt}")]
    facts: dict[str, Any] = {}
    if "student-rl" in run.manifest["stages"]:
        alone = run.facts("student-rl")
        flops = {"student": alone["distillation_flops"], "student by RL alone": alone["rl_flops"]}
        table = comparison_table({**models, "student by RL alone": alone["results"]}, flops)
        (before,), (after,), (other,) = (part["results"].values() for part in (distilled["base"], distilled, alone))
        verdict = distillation_verdict(before, after, other, alone["rl_flops"], alone["distillation_flops"])
        facts["claims"] = [verdict._asdict()]
        sections = [("Distillation and RL alone", f"{table}\n\n{claims_table([verdict])}\n\n{learnt}"), *curves(run)]
    print(sections[0][1])
    sections.append(("Held-out problems in training texts", seen_in_training(run, steps, [steps.prompts])))
    sections.append(("Stages", stage_times(run)))
    text = "\n\n".join(f"## {heading}\n\n{body}" for heading, body in sections)
    write_atomic(run.directory / "report.md", f"# {run.directory.resolve().name}\n\n{text}\n")
    return facts
