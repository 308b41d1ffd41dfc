"""The R1 ladder as a page: every stage on every set of held-out problems, what each added, its curves and samples."""

import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finback.data.files import write_atomic
from finback.eval.statistics import paired_difference
from finback.recipes.stages import Run
from finback.rl.report import first_and_last
from finback.train.metrics import METRICS_FILE, read_metrics
from finback.train.report import BLUE, GREEN, GREY, ORANGE, RED

LADDER = (
    ("base", "r1-zero", "base"),
    ("r1-zero", "r1-zero", None),
    ("r1-zero-language", "r1-zero-language", None),
    ("cold-start", "cold-start", None),
    ("reasoning-rl", "reasoning-rl", None),
    ("rejection-sft", "rejection-sft", None),
    ("all-scenario-rl", "all-scenario-rl", None),
    ("student-base", "student", "base"),
    ("student", "student", None),
    ("student-rl", "student-rl", None),
)
"""Model, stage whose entry in the manifest holds its numbers, and the key inside it where they are not the stage's own."""
RL_STAGES = ("r1-zero", "r1-zero-language", "reasoning-rl", "all-scenario-rl", "student-rl")
_STEPS = (
    ("base", "r1-zero"),
    ("r1-zero", "r1-zero-language"),
    ("base", "cold-start"),
    ("cold-start", "reasoning-rl"),
    ("base", "rejection-sft"),
    ("reasoning-rl", "rejection-sft"),
    ("rejection-sft", "all-scenario-rl"),
    ("r1-zero", "all-scenario-rl"),
    ("student-base", "student"),
    ("student-base", "student-rl"),
    ("student-rl", "student"),
    ("all-scenario-rl", "student"),
)


def measured(run: Run) -> dict[str, Mapping[str, Any]]:
    """Model -> title -> numbers, for the stages that are finished, in the ladder's order."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, stage, key in LADDER:
        if stage in run.manifest["stages"]:
            facts = run.facts(stage)
            found[name] = (facts if key is None else facts[key])["results"]
    return found


def ladder_table(run: Run) -> str:
    """`comparison_table` of the run's models."""
    return comparison_table(measured(run))


def comparison_table(models: Mapping[str, Mapping[str, Any]], flops: Mapping[str, float] | None = None) -> str:
    """A Markdown table of every model on every set, with 95% intervals over problems; with `flops`, what some took stands behind."""
    header = "| model | problems | pass@1, T 0.6 | greedy | cons@k | pass@k | form | mixed thoughts | tokens |"
    lines = [header, "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    if flops is not None:
        lines = [f"{lines[0]} FLOPs |", f"{lines[1]}---:|"]
    for name, results in models.items():
        for title, n in results.items():
            line = (
                f"| {name} | {title} | {_interval(n['pass_at_1'])} | {_interval(n['greedy'])} | {n['cons'][0]:.1%} | "
                f"{n['pass_at_k'][0]:.1%} | {n['format_rate']:.0%} | {n['mixing_rate']:.0%} | {n['mean_tokens']:.0f} |"
            )
            if flops is not None:
                line += f" {flops[name]:.3g} |" if name in flops else " |"
            lines.append(line)
    return "\n".join(lines)


def _interval(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def rises(run: Run) -> str:
    """A Markdown table of the differences between stages: paired by problem, with 95% intervals."""
    models = measured(run)
    lines = ["| from | to | problems | points of pass@1 | beyond chance |", "|---|---|---|---:|---|"]
    for before, after in _STEPS:
        if before in models and after in models:
            for title in models[after]:
                change = paired_difference(models[before][title]["scores"], models[after][title]["scores"])
                sure = "yes" if change[1] > 0 or change[2] < 0 else "no"
                points = f"{100 * change[0]:+.1f} ({100 * change[1]:+.1f} to {100 * change[2]:+.1f})"
                lines.append(f"| {before} | {after} | {title} | {points} | {sure} |")
    return "\n".join(lines)


def curves(run: Run) -> Iterator[tuple[str, str]]:
    """A section for each stage of reinforcement learning, with its first and last step, its picture, and a sample of its model."""
    for stage in RL_STAGES:
        directory = run.directory / "training" / stage
        if stage in run.manifest["stages"]:
            picture = directory / "plots" / "curves.png"
            parts = [first_and_last(_rows(directory))]
            if picture.exists():
                parts.append(f"![Curves of {stage}]({picture.relative_to(run.directory)})")
            for title, numbers in run.facts(stage)["results"].items():
                for prompt, completion in numbers["shown"][:1]:
                    parts.append(f"On {title}:\n\n````text\n{prompt}▌{completion}\n````")
            yield run.facts(stage)["title"], "\n\n".join(parts)


def draw_ladder(run: Run) -> Path | None:
    """plots/ladder.png: every model's pass@1 with its interval, and over the steps of each reinforcement learning the length of a
    sample, the share with words of reflection, and the reward for being right. None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(2, 2)
    bars, models = grid[0, 0], measured(run)
    title = next(iter(next(iter(models.values()))))
    for place, results in enumerate(models.values()):
        value, low, high = results[title]["pass_at_1"]
        bars.bar(place, 100 * value, color=BLUE, yerr=[[100 * (value - low)], [100 * (high - value)]], capsize=3)
    bars.set_xticks(range(len(models)), list(models), rotation=35, ha="right", fontsize=8)
    bars.set_title(f"pass@1 on {title}, T 0.6, with 95% intervals", fontsize=10, loc="left")
    panels = (
        (grid[0, 1], "Length of a sample, tokens", ("completion_length",)),
        (grid[1, 0], "Share of samples with words of reflection", ("reflection",)),
        (grid[1, 1], "Share of samples that are right", ("reward/exact_answer_tag", "reward/exact", "reward/rule")),
    )
    for axes, name, keys in panels:
        for stage, colour in zip(RL_STAGES, (BLUE, ORANGE, GREEN, RED, GREY), strict=True):
            rows = _rows(run.directory / "training" / stage) if stage in run.manifest["stages"] else []
            points = [(row["step"], row[key]) for row in rows for key in keys if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=stage)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylim(bottom=0)
    grid[0, 1].legend(frameon=False, fontsize=8)
    for axes in grid.flatten():
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    file = run.directory / "plots" / "ladder.png"
    write_atomic(file, picture.getvalue())
    return file


def _rows(directory: Path) -> list[dict[str, Any]]:
    return read_metrics(directory / METRICS_FILE)
