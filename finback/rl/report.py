"""`report.md` and `plots/*.png` of a GRPO run, from its records alone."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finback.data.files import read_json, write_atomic
from finback.train.metrics import METRICS_FILE, SAMPLES_FILE, read_metrics
from finback.train.report import BLUE, GREEN, GREY, ORANGE, PALE_BLUE, PLOTS_DIRECTORY, RED, REPORT_FILE, machine_line, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TABLE = (
    ("reward", "reward", "{:.3f}"),
    ("completion_length", "length of a sample in tokens", "{:.1f}"),
    ("failed_rewards", "share of samples on which a reward failed", "{:.1%}"),
    ("truncated", "share of samples cut at the longest length", "{:.1%}"),
    ("entropy", "entropy, nats per token", "{:.3f}"),
    ("kl", "divergence from the reference, nats per token", "{:.4f}"),
    ("clip_fraction", "share of tokens held by the clip", "{:.2%}"),
    ("zero_variance", "share of groups with equal rewards", "{:.1%}"),
    ("reflection", "share of samples with words of reflection", "{:.1%}"),
    ("logprob_gap", "distance of trainer and engine, nats per token", "{:.4f}"),
    ("value_loss", "loss of the critic", "{:.4f}"),
    ("mtp_acceptance", "share of MTP drafts that the model agrees with", "{:.1%}"),
    ("grad_norm", "gradient norm", "{:.3f}"),
    ("rollout_tokens_per_second", "tokens per second of sampling", "{:,.0f}"),
    ("tokens_per_second", "tokens per second of training", "{:,.0f}"),
)
# The panels of the picture: title, the series in it, and whether it starts at 0.
_PANELS = (
    ("Length of a sample, tokens", ("completion_length",)),
    ("Entropy, nats per token", ("entropy",)),
    ("Clip fraction and divergence", ("clip_fraction", "kl")),
    ("Groups with equal rewards, reflection", ("zero_variance", "reflection")),
    ("Trainer against engine, nats per token", ("logprob_gap",)),
    ("Accepted drafts of the MTP module", ("mtp_acceptance",)),
    ("Tokens per second, sampling and training", ("rollout_tokens_per_second", "tokens_per_second")),
)
_COLOURS = (BLUE, ORANGE, GREEN, RED, GREY, PALE_BLUE)


def write_report(run_directory: str | Path, verb: str = "grpo") -> None:
    """Write `report.md` and the plots of the run, which `verb` goes on with.

    Raises:
        InputError: a record is missing or broken.
        OSError: the directory cannot be written.
    """
    run = Path(run_directory)
    config, rows = read_json(run / "config.json"), read_metrics(run / METRICS_FILE)
    samples = read_metrics(run / SAMPLES_FILE) if (run / SAMPLES_FILE).exists() else []
    picture = _draw(run, rows)
    parts = [f"# {run.resolve().name}", _summary(config, rows), f"## First and last\n\n{first_and_last(rows)}"]
    if rows and "mtp_acceptance_after" in rows[-1]:
        parts.append(f"## Multi-token prediction\n\n{tell_drafts(rows, frozen=config['freeze_mtp'])}")
    if picture is not None:
        parts.append(f"## Curves\n\n![Curves]({picture.parent.name}/{picture.name})")
    if samples:
        parts.append("## Samples\n\n" + "\n\n".join(_sample(sample) for sample in _first_and_last_step(samples)))
    again = (
        f"finback {verb} --resume {run}"
        if rows and rows[-1]["step"] < config["steps"]
        else f"finback chat {_last_checkpoint(run)}"
    )
    parts.append(f"## Go on\n\n```\n{again}\n```")
    write_atomic(run / REPORT_FILE, "\n\n".join(parts) + "\n")


def first_and_last(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what the first and the last step measured."""
    components = sorted({key for row in rows for key in row if key.startswith("reward/")})
    table = [_TABLE[0], *((key, f"reward: {key.partition('/')[2]}", "{:.3f}") for key in components), *_TABLE[1:]]
    lines = ["| | first | last |", "|---|---:|---:|"]
    for key, name, form in table:
        values = [row[key] for row in rows if key in row]
        if values:
            lines.append(f"| {name} | {form.format(values[0])} | {form.format(values[-1])} |")
    return "\n".join(lines)


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Eight panels over steps: the reward and its components, and what tells of the policy's health."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.5, 6.2), layout="constrained")
    components = sorted({key for row in rows for key in row if key.startswith("reward/")})
    panels = [("Reward", ("reward", *components)), *_PANELS]
    for axes, (title, keys) in zip(figure.subplots(2, 4).flatten(), panels, strict=True):
        for key, colour in zip(keys, _COLOURS, strict=False):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, color=colour, linewidth=1.6, label=key.removeprefix("reward/").replace("_", " "))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    return figure


def tell_drafts(rows: Sequence[Mapping[str, Any]], *, frozen: bool) -> str:
    """How well the MTP module drafts what the policy writes, before and after a finished run."""
    how = "frozen" if frozen else "trained along"
    return (
        f"The MTP module, {how}, drafts the token after next. The main head agrees with {rows[0]['mtp_acceptance']:.1%} of its drafts "
        f"before the run and with {rows[-1]['mtp_acceptance_after']:.1%} after it: the share that greedy speculative decoding accepts."
    )


def _draw(run: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    if not rows or find_spec("matplotlib") is None:
        return None
    file = run / PLOTS_DIRECTORY / "curves.png"
    write_atomic(file, png(draw_curves(rows)))
    return file


def _summary(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    rewards = (*config["reward"], *config.get("reward_model", ()))
    lines = [f"**Rewards**: {', '.join(f'`{spec}`' for spec in rewards)}."]
    lines.append(
        f"**Samples**: {config['prompts_per_step']} prompts x {config['num_generations']} a step at temperature "
        f"{config['temperature']:g}; loss `{config['loss']}`, epsilon {config['epsilon']:g}, beta {config['beta']:g}, "
        f"learning rate {config['lr']:g}."
    )
    if rows:
        last = rows[-1]
        lines.append(f"**Run**: {last['step']:,} steps, {last['tokens']:,} tokens sampled in {last['seconds']:,.0f} s.")
    lines.append(f"**Precision**: {config['precision']}. **Seed**: {config['seed']}.")
    lines.append(f"**Machine**: {machine_line()}.")
    return "  \n".join(lines)


def _first_and_last_step(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    steps = (samples[0]["step"], samples[-1]["step"])
    return [sample for sample in samples if sample["step"] in steps][:8]


def _sample(sample: Mapping[str, Any]) -> str:
    """A code block that the text cannot leave: its fence is longer than any in the text. A mark ends the prompt."""
    text = f"{sample['prompt']}▌{sample['completion']}".rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0))
    scores = ", ".join(f"{name} {value:g}" for name, value in sample["components"].items())
    return f"Step {sample['step']}, reward {sample['reward']:g} ({scores}):\n\n{fence}text\n{text}\n{fence}"


def _last_checkpoint(run: Path) -> Path:
    steps = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    return steps[-1] if steps else run
