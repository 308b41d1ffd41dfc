"""`report.md` and `plots/*.png` of a run, drawn from its records alone: they can be written again at any time.

matplotlib (the extra `report`) is imported only when something is drawn; without it the report has no pictures.
"""

import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finback.config import ModelConfig, count_params
from finback.data.files import read_json, write_atomic
from finback.train.metrics import EXPERT_LOAD_FILE, METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS_DIRECTORY = "plots"
REPORT_FILE = "report.md"
MOST_HEATMAPS = 8  # of a deep model, this many routers are shown, spread evenly
MOST_COLUMNS = 240  # steps are averaged into at most this many columns of a heat map

INK, GREY, LIGHT = "#22303c", "#8896a3", "#e3e8ed"
BLUE, PALE_BLUE, ORANGE, GREEN, RED = "#1f6feb", "#a9c7f5", "#e36209", "#1a7f37", "#cf222e"

# The rows of the table of first and last values: key, name, form.
_TABLE = (
    ("loss", "training loss, nats per token", "{:.4f}"),
    ("mtp_loss", "loss of the multi-token prediction module", "{:.4f}"),
    ("validation_loss", "held-out loss, nats per token", "{:.4f}"),
    ("validation_bits_per_byte", "held-out bits per byte", "{:.4f}"),
    ("mtp_acceptance", "share of MTP drafts that the main head agrees with", "{:.1%}"),
    ("balance_loss", "sequence-wise balance loss", "{:.4f}"),
    ("max_violation", "max violation of expert balance", "{:.3f}"),
    ("grad_norm", "gradient norm", "{:.3f}"),
    ("lr", "learning rate", "{:.2e}"),
    ("tokens_per_second", "tokens per second", "{:,.0f}"),
    ("mfu", "model FLOPs utilisation (MFU)", "{:.1%}"),
)


def write_report(
    run_directory: str | Path,
    *,
    samples: Sequence[tuple[str, str]] = (),
    sections: Sequence[tuple[str, str]] = (),
    reference_loss: Mapping[str, float] | None = None,
    verb: str = "pretrain",
) -> None:
    """Write `report.md` and the plots of `run_directory` from config.json, metrics.jsonl and expert_load.jsonl.

    Args:
        samples: (prompt, continuation) pairs to show.
        sections: (heading, Markdown text) of the caller's own, placed after the summary.
        reference_loss: other models' held-out losses in nats per token of the same tokens, drawn into the loss plot.
        verb: the command that the run belongs to.

    Raises:
        InputError: a record is missing or broken.
        OSError: the directory cannot be written.
    """
    run = Path(run_directory)
    config = read_json(run / "config.json")
    rows = read_metrics(run / METRICS_FILE)
    plots = draw_plots(run, reference_loss=reference_loss)
    parts = [f"# {run.resolve().name}", _summary(run, config, rows)]
    parts += [f"## {heading}\n\n{text.strip()}" for heading, text in sections]
    parts.append(f"## First and last\n\n{_table(rows)}")
    parts.append(_pictures(plots))
    if samples:
        parts.append("## Samples\n\n" + "\n\n".join(_sample(*sample) for sample in samples))
    parts.append(f"## Go on\n\n{_go_on(run, verb)}")
    write_atomic(run / REPORT_FILE, "\n\n".join(parts) + "\n")


def draw_plots(run_directory: str | Path, *, reference_loss: Mapping[str, float] | None = None) -> list[Path]:
    """Draw what the records allow into `plots/`; returns the files, none if matplotlib is not installed."""
    run = Path(run_directory)
    if find_spec("matplotlib") is None:
        return []
    rows = read_metrics(run / METRICS_FILE)
    load_file = run / EXPERT_LOAD_FILE
    loads = read_metrics(load_file) if load_file.exists() else []
    model = _model(read_json(run / "config.json"))
    figures = {"loss": draw_loss(rows, reference_loss or {}), "throughput": draw_throughput(rows)}
    if loads:
        figures["expert_load"] = draw_expert_load(loads, rows, _router_names(model, len(loads[0]["counts"])))
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(run / PLOTS_DIRECTORY / f"{name}.png")
            write_atomic(files[-1], png(figure))
    return sorted(files)


def png(figure: "Figure") -> bytes:
    """The figure at 130 dots per inch. `savefig` would draw it once more before, only to find the layout that drawing finds, too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(130)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def draw_loss(rows: Sequence[Mapping[str, Any]], reference_loss: Mapping[str, float]) -> "Figure | None":
    """Training, MTP and held-out loss over tokens, with other models' held-out loss as dashed lines."""
    figure = _figure(8, 4.6)
    axes = figure.add_subplot()
    drawn = []
    for key, name, colour, pale in (
        ("loss", "training", BLUE, PALE_BLUE),
        ("mtp_loss", "multi-token prediction (one token further)", GREEN, "#b7dfc1"),
    ):
        tokens, values = _series(rows, key)
        if len(values):
            axes.plot(tokens, values, color=pale, linewidth=0.8)
            axes.plot(tokens, _smooth(values), color=colour, linewidth=1.8, label=name)
            drawn.append(values)
    tokens, values = _series(rows, "validation_loss")
    if len(values):
        axes.plot(tokens, values, color=ORANGE, linewidth=1.8, marker="o", markersize=4.5, label="held-out", zorder=3)
        drawn.append(values)
    if not drawn:
        return None
    for name, loss in reference_loss.items():
        axes.axhline(loss, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label=f"held-out, {name}")
    lowest = min([*(float(values.min()) for values in drawn), *reference_loss.values()])
    highest = max(float(np.percentile(values, 99.5)) for values in drawn)
    axes.set_ylim(lowest - 0.05 * (highest - lowest) - 0.01, highest + 0.05 * (highest - lowest) + 0.01)
    _finish(axes, "Loss", "nats per token")
    axes.legend(frameon=False, fontsize=9)
    return figure


def draw_throughput(rows: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Tokens per second over tokens, and below it the share of the machine's matmul rate where it was measured."""
    panels = [
        (key, title, unit, scale)
        for key, title, unit, scale in (
            ("tokens_per_second", "Throughput", "tokens per second", 1.0),
            ("mfu", "Model FLOPs utilisation", "% of the machine's matmul rate", 100.0),
        )
        if len(_series(rows, key)[1])
    ]
    if not panels:
        return None
    figure = _figure(8, 1.2 + 2.6 * len(panels))
    for index, (key, title, unit, scale) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        tokens, values = _series(rows, key)
        values = values * scale
        median = float(np.median(values))
        axes.plot(tokens, values, color=PALE_BLUE, linewidth=0.8)
        axes.plot(tokens, _smooth(values), color=BLUE, linewidth=1.8)
        label = f"median {median:,.0f}" if median >= 100 else f"median {median:.3g}"
        axes.axhline(median, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
        axes.set_ylim(0, 1.15 * float(np.percentile(values, 99)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _finish(axes, title, unit)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_expert_load(loads: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "Figure":
    """A heat map per router, experts over steps, in multiples of the mean load; below them the curve of max violation.

    Args:
        loads: rows of expert_load.jsonl; `counts` is [num routers, E].
        names: what each router is called.
    """
    steps = np.array([row["step"] for row in loads])
    counts = np.array([row["counts"] for row in loads], dtype=np.float64)  # [steps, routers, E]
    columns = [chunk for chunk in np.array_split(np.arange(len(steps)), min(MOST_COLUMNS, len(steps))) if len(chunk)]
    binned = np.stack([counts[chunk].sum(axis=0) for chunk in columns], axis=-1)  # [routers, E, columns]
    relative = binned / np.maximum(binned.mean(axis=1, keepdims=True), 1e-9)
    shown = np.unique(np.linspace(0, len(names) - 1, min(MOST_HEATMAPS, len(names))).round().astype(int))
    ratios = [1.0] * len(shown) + [1.25]
    figure = _figure(8, 1.4 + 1.15 * len(shown) + 1.7)
    panels = figure.subplots(len(ratios), 1, height_ratios=ratios, sharex=True)
    image = None
    for axes, router in zip(panels, shown, strict=False):
        extent = (float(steps[0]), float(steps[-1]) + 1, -0.5, relative.shape[1] - 0.5)
        image = axes.imshow(
            relative[router],
            aspect="auto",
            origin="lower",
            extent=extent,
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        axes.set_ylabel("expert", fontsize=9, color=INK)
        axes.set_title(names[router], fontsize=9.5, loc="left", color=INK)
        axes.tick_params(labelsize=8.5, colors=INK)
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels[:-1]), fraction=0.03, pad=0.01)
        bar.set_label("load / mean load (1 is balanced)", fontsize=9, color=INK)
    at, values = _series(rows, "max_violation", over="step")
    if len(values):
        panels[-1].plot(at, values, color="#f2b8bd", linewidth=0.8)
        panels[-1].plot(at, _smooth(values), color=RED, linewidth=1.8)
        panels[-1].set_ylim(0, 1.1 * float(np.percentile(values, 99.5)) + 0.01)
    title = "Max violation: (busiest expert - mean) / mean, of the worst router in each step"
    _finish(panels[-1], title, "0 is balanced", title_size=9.5)
    panels[-1].set_xlabel("step", fontsize=9.5, color=INK)
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.suptitle("Load of the experts", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot: no windows, no global state

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _finish(axes: "Axes", title: str, unit: str, title_size: float = 12) -> None:
    weight = "bold" if title_size > 10 else "normal"
    axes.set_title(title, fontsize=title_size, fontweight=weight, loc="left", color=INK)
    axes.set_xlabel("tokens", fontsize=9.5, color=INK)
    axes.set_ylabel(unit, fontsize=9.5, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _series(rows: Sequence[Mapping[str, Any]], key: str, over: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """(tokens or steps, values) of the rows that hold a finite `key`."""
    points = [(row[over], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return np.array([point[0] for point in points], dtype=float), np.array([point[1] for point in points], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over 2% of the points, narrower at both ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    mean: np.ndarray = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    return mean


def _count(value: float) -> str:
    """1,234,567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _model(config: Mapping[str, Any]) -> ModelConfig | None:
    return ModelConfig.from_dict(config["model"]) if isinstance(config.get("model"), Mapping) else None


def _router_names(model: ModelConfig | None, count: int) -> list[str]:
    if model is None or count != model.num_moe_layers + model.num_nextn_predict_layers:
        return [f"router {index}" for index in range(count)]
    main = [f"layer {model.first_k_dense_replace + index}" for index in range(model.num_moe_layers)]
    return main + [f"MTP module {depth + 1}" for depth in range(model.num_nextn_predict_layers)]


def _summary(run: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    model = _model(config)
    if model is not None:
        count = count_params(model)
        mtp = f", {_count(count.mtp)} more stored for multi-token prediction" if count.mtp else ""
        lines.append(
            f"**Model**: {model.num_hidden_layers} layers of width {model.hidden_size}, {_parts(model)}, "
            f"vocabulary {model.vocab_size:,}: {_count(count.total)} parameters, "
            f"{_count(count.active)} active per token{mtp}."
        )
    if config.get("data"):
        inside = (directory.removeprefix(f"{run.resolve()}/") for directory in config["data"])
        lines.append(f"**Data**: {', '.join(f'`{directory}`' for directory in inside)}.")
    if rows:
        seconds = rows[-1].get("seconds")
        took = f" in {_duration(seconds)}" if seconds is not None else ""
        lines.append(f"**Run**: {rows[-1]['step']:,} steps, {rows[-1].get('tokens', 0):,} tokens{took}.")
    if config.get("precision"):
        lines.append(f"**Precision**: {config['precision']}. **Seed**: {config.get('seed')}.")
    lines.append(f"**Machine**: {machine_line()}.")
    return "  \n".join(lines)


def _parts(model: ModelConfig) -> str:
    if not model.n_routed_experts:
        return f"dense {model.model_type}, {model.num_attention_heads} heads over {model.num_key_value_heads} of keys and values"
    return (
        f"{model.n_routed_experts} routed experts ({model.num_experts_per_tok} per token) and "
        f"{model.n_shared_experts} shared, latent rank {model.kv_lora_rank}"
    )


def machine_line() -> str:
    """What this report was made on, in one line."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own word stands
    import torch

    words = [name, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} torch threads", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        words.insert(0, torch.cuda.get_device_name())
    return ", ".join(words)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| | first | last |", "|---|---:|---:|"]
    for key, name, form in _TABLE:
        values = [row[key] for row in rows if key in row]
        if values:
            lines.append(f"| {name} | {form.format(values[0])} | {form.format(values[-1])} |")
    return "\n".join(lines)


def _pictures(plots: Sequence[Path]) -> str:
    if not plots:
        absent = find_spec("matplotlib") is None
        return "No plots: " + ("matplotlib is not installed (the extra `report` brings it)." if absent else "no rows yet.")
    titles = {"loss": "Loss", "expert_load": "Expert load", "throughput": "Throughput"}
    ordered = sorted(plots, key=lambda file: list(titles).index(file.stem))
    return "\n\n".join(f"## {titles[file.stem]}\n\n![{titles[file.stem]}]({file.parent.name}/{file.name})" for file in ordered)


def _sample(prompt: str, continuation: str) -> str:
    """A code block that the text cannot leave: its fence is longer than any in the text. A mark ends the prompt."""
    text = f"{prompt}▌{continuation}".rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _go_on(run: Path, verb: str) -> str:
    steps = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    directory = next((path for path in (run / "final", *reversed(steps)) if path.is_dir()), run / "checkpoints" / "step-N")
    uses = {"pretrain": [f"generate {directory} --prompt {json.dumps('Once upon a time')}"], "sft": [f"chat {directory}"]}
    commands = [f"finback {words}" for words in (*uses.get(verb, []), f"{verb} --resume {run}")]
    return "\n".join(("```", *commands, "```"))


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
