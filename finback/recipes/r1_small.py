"""`finback r1 small`: R1's whole story on two cores, and whether each of its claims holds there."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from finback.recipes import ablations, base_model, ladder
from finback.recipes.config import LadderConfig, QuickstartConfig
from finback.recipes.ladder_report import curves, draw_ladder, ladder_table, rises
from finback.recipes.pace import fit_to_machine
from finback.recipes.small_claims import claims, claims_table
from finback.recipes.stages import Run, Stage, copy_model, open_run, run_or_skip, stage_times
from finback.recipes.sums_with_room import SUMS_WITH_ROOM, roomy_ladder, student_rl_settings
from finback.train.config import PretrainConfig
from finback.train.report import write_report

_NOT_SETTINGS = ("out", "cache", "fresh")


def r1_small(config: QuickstartConfig, preset: PretrainConfig, student_preset: PretrainConfig) -> Path:
    """Run the recipe, or what is left of it, in `config.out`; returns the directory with the finished model.

    Args:
        preset: the model and its pre-training recipe; vocabulary, data and length of training are the config's.
        student_preset: the same of the dense student.

    Raises:
        InputError: a field is wrong, `out` holds something else, or a stage did not improve what it must.
        OSError: the disk is full; what was finished stays, and the next call goes on from there.
        KeyboardInterrupt: after Ctrl-C; a stage that trains has saved before.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    run = open_run(Path(config.out), "r1-small", settings, fresh=config.fresh)
    stages = r1_small_stages(run, fit_to_machine(run, config, preset), preset, student_preset)
    run_or_skip(run, stages, f"finback r1 small --out {run.directory}, with the same fields")
    print(f"\nTalk with it:            finback chat {run.directory / 'final'}")
    print(f"Read what happened:      {run.directory / 'report.md'}")
    return run.directory / "final"


def r1_small_stages(run: Run, config: QuickstartConfig, preset: PretrainConfig, student_preset: PretrainConfig) -> list[Stage]:
    """The recipe, in order."""
    steps = roomy_ladder(run.directory / "data", config)
    alone = student_rl_settings(steps)
    return [
        Stage("corpus", "Corpus", partial(base_model.corpus, config=config, task=SUMS_WITH_ROOM)),
        Stage("tokenizer", "Tokenizer", partial(base_model.tokenizer, config=config, preset=preset)),
        Stage("shards", "Token shards", partial(base_model.shards, config=config)),
        Stage("base", "Pre-training", partial(base_model.base, config=config, preset=preset)),
        Stage("r1-zero", "R1-Zero: GRPO from the base", partial(ladder.r1_zero, ladder=steps)),
        Stage("r1-zero-language", "R1-Zero, one language rewarded", partial(ablations.r1_zero_language, ladder=steps)),
        Stage("cold-start", "Cold start: SFT", partial(ladder.cold_start, ladder=steps)),
        Stage("reasoning-rl", "Reasoning RL", partial(ladder.reasoning_rl, ladder=steps)),
        Stage("rejection-sft", "Rejection sampling, SFT", partial(ladder.rejection_sft, ladder=steps)),
        Stage("all-scenario-rl", "All-scenario RL", partial(ladder.all_scenario_rl, ladder=steps)),
        Stage("student-base", "A dense student's base", partial(base_model.student_base, config=config, preset=student_preset)),
        Stage("student", "Distillation", partial(ladder.student, ladder=steps)),
        Stage("student-rl", "The same student by RL alone", partial(ablations.student_rl, ladder=steps, settings=alone)),
        Stage("report", "Report", partial(report, steps=steps)),
    ]


def report(run: Run, steps: LadderConfig) -> dict[str, Any]:
    """`final/`, `report.md` and the plots; the claims and their verdicts go into the manifest."""
    copy_model(run.directory / "all-scenario-rl", run.directory / "final")
    seen = base_model.seen_problems(run, steps.held_out)
    verdicts = claims(run.manifest["stages"])
    table, verdict_table = ladder_table(run), claims_table(verdicts)
    print(f"{table}\n\n{verdict_table}")
    picture = draw_ladder(run)
    write_report(
        run.directory,
        sections=[
            ("The claims", verdict_table),
            ("The R1 ladder", table),
            *([("The ladder and its curves", f"![The ladder]({picture.relative_to(run.directory)})")] if picture else []),
            ("What each stage added", rises(run)),
            ("Held-out problems in training texts", seen),
            *curves(run),
            ("Stages", stage_times(run)),
        ],
    )
    print(run.directory / "report.md")
    return {"seen": seen, "claims": [verdict._asdict() for verdict in verdicts]}
