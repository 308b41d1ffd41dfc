"""The main job: from nothing to a small model with DeepSeek-V3's architecture that has learnt to reason, in minutes on two cores."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from finback.recipes import base_model, ladder
from finback.recipes.config import LadderConfig, QuickstartConfig
from finback.recipes.ladder_report import curves, ladder_table, rises
from finback.recipes.pace import fit_to_machine
from finback.recipes.small_ladder import small_ladder
from finback.recipes.stages import Run, Stage, copy_model, open_run, run_or_skip, stage_times
from finback.train.config import PretrainConfig
from finback.train.report import write_report

# Not of the recipe: they decide where a run lies and how it begins, not what it computes.
_NOT_SETTINGS = ("out", "cache", "fresh")


def quickstart(config: QuickstartConfig, preset: PretrainConfig, student_preset: PretrainConfig) -> Path:
    """Run the recipe, or what is left of it, in `config.out`; returns the directory with the finished model.

    Args:
        preset: the model and its pre-training recipe; vocabulary, data and length of training are the quickstart's.
        student_preset: the same of the dense student.

    Raises:
        InputError: a field is wrong, `out` holds something else, or a stage did not improve what it must.
        OSError: the disk is full; what was finished stays, and the next call goes on from there.
        KeyboardInterrupt: after Ctrl-C; a stage that trains has saved before.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    run = open_run(Path(config.out), "quickstart", settings, fresh=config.fresh)
    stages = quickstart_stages(run, fit_to_machine(run, config, preset), preset, student_preset)
    run_or_skip(run, stages, f"finback quickstart --out {run.directory}")
    _say_what_next(run)
    return run.directory / "final"


def quickstart_stages(run: Run, config: QuickstartConfig, preset: PretrainConfig, student_preset: PretrainConfig) -> list[Stage]:
    """The recipe, in order."""
    steps = small_ladder(run.directory / "data", config)
    return [
        Stage("corpus", "Corpus", partial(base_model.corpus, config=config)),
        Stage("tokenizer", "Tokenizer", partial(base_model.tokenizer, config=config, preset=preset)),
        Stage("shards", "Token shards", partial(base_model.shards, config=config)),
        Stage("base", "Pre-training", partial(base_model.base, config=config, preset=preset)),
        Stage("comparison", "Held-out bits per byte", partial(base_model.comparison, config=config, preset=preset)),
        Stage("samples", "Samples", partial(base_model.samples, config=config)),
        Stage("r1-zero", "R1-Zero: GRPO from the base", partial(ladder.r1_zero, ladder=steps)),
        Stage("cold-start", "Cold start: SFT", partial(ladder.cold_start, ladder=steps)),
        Stage("reasoning-rl", "Reasoning RL", partial(ladder.reasoning_rl, ladder=steps)),
        Stage("rejection-sft", "Rejection sampling, SFT", partial(ladder.rejection_sft, ladder=steps)),
        Stage("all-scenario-rl", "All-scenario RL", partial(ladder.all_scenario_rl, ladder=steps)),
        Stage("student-base", "A dense student's base", partial(base_model.student_base, config=config, preset=student_preset)),
        Stage("student", "Distillation", partial(ladder.student, ladder=steps)),
        Stage("report", "Report", partial(report, steps=steps)),
    ]


def report(run: Run, steps: LadderConfig) -> dict[str, Any]:
    """`final/`, `report.md` and the plots."""
    copy_model(run.directory / "all-scenario-rl", run.directory / "final")
    measured = run.facts("comparison")["held_out"]
    header = "| held-out text | tokens | bytes | finback, bits per byte | trigram, bits per byte |\n|---|---:|---:|---:|---:|\n"
    lines = (
        f"| {name} | {row['tokens']:,} | {row['bytes']:,} | {row['bits_per_byte']:.3f} | {row['trigram_bits_per_byte']:.3f} |"
        for name, row in measured.items()
    )
    seen = base_model.seen_problems(run, steps.held_out)
    table = ladder_table(run)
    print(table)
    write_report(
        run.directory,
        samples=[(sample["prompt"], sample["continuation"]) for sample in run.facts("samples")["samples"]],
        sections=[
            ("The R1 ladder", table),
            ("What each stage added", rises(run)),
            ("Held-out problems in training texts", seen),
            *curves(run),
            ("Beside an interpolated trigram model", header + "\n".join(lines)),
            ("Stages", stage_times(run)),
        ],
        reference_loss={"interpolated trigram": measured["all"]["trigram_nats_per_token"]},
    )
    print(f"{run.directory / 'report.md'}")
    for plot in sorted((run.directory / "plots").glob("*.png")):
        print(f"{plot}")
    return {"seen": seen}


def _say_what_next(run: Run) -> None:
    final = run.directory / "final"
    print(
        f"\nTalk with it:            finback chat {final}"
        f"\nGenerate from it:        finback generate {final} --prompt '...'"
        f"\nRead what happened:      {run.directory / 'report.md'}"
        f"\nLoad it elsewhere:       transformers.AutoModelForCausalLM.from_pretrained({str(final)!r})"
    )
