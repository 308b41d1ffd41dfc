"""Schedules and plans as pictures: letters for a terminal, PNG files by matplotlib, which is imported only where one is made."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from finback.config import InputError
from finback.parallel.schedule import Action, Kind, Simulation
from finback.planner.fit import FitRow
from finback.planner.model import ModelPlan
from finback.planner.rl import RLPlan
from finback.planner.serve import ServePlan
from finback.planner.train import TrainPlan

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

COLORS = {
    Kind.FORWARD: "#4c78a8",
    Kind.BACKWARD: "#f58518",
    Kind.BACKWARD_INPUT: "#e45756",
    Kind.BACKWARD_WEIGHT: "#72b7b2",
    Kind.OVERLAPPED: "#9d6fb0",
}
_LETTERS = {Kind.OVERLAPPED: "P"}  # a pair


def columns_per_unit(result: Simulation, shortest: float, width: int) -> float:
    """Columns of one unit of time: a shortest action of four columns where that fits into `width`, else less."""
    return min(4.0 / shortest, max(1.0, width - 6) / result.makespan)


def cells(
    actions: Sequence[Action], spans: Sequence[tuple[float, float]], scale: float, end: float
) -> list[tuple[str, Kind | None]]:
    """One rank's line: pieces of text with the kind of their action, None for waiting."""
    pieces: list[tuple[str, Kind | None]] = []
    column = 0
    for action, (start, stop) in zip(actions, spans, strict=True):
        first, last = round(start * scale), round(stop * scale)
        if first > column:
            pieces.append(("." * (first - column), None))
        letter = _LETTERS.get(action.kind, action.kind.value)
        text = f"{letter}{action.microbatch}"
        text = text if len(text) <= last - first else letter  # a cut number would be another micro-batch's
        pieces.append((text[: last - first].ljust(last - first), action.kind))
        column = max(column, last)
    rest = round(end * scale) - column
    if rest > 0:
        pieces.append(("." * rest, None))
    return pieces


def _figure(width: float, height: float) -> "Figure":
    if find_spec("matplotlib") is None:
        raise InputError("--png needs matplotlib, which is in the extra report: pip install 'finback[report]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _bytes(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})  # the usual level takes a third of the time
    return buffer.getvalue()


MOST_LABELS = 1000
"""Actions of a schedule up to which each is drawn with its micro-batch: more would be unreadable, and slow."""
_PIXELS = 1800
"""Columns of a large schedule's picture, about as many as the page has."""


def schedule_png(title: str, schedule: Sequence[Sequence[Action]], result: Simulation) -> bytes:
    """The timeline of every rank; the number in a box is its micro-batch, in a pair those of forward and backward. Large schedules
    have no numbers."""
    ranks = len(schedule)
    labelled = sum(map(len, schedule)) <= MOST_LABELS
    figure = _figure(16, min(30.0 if labelled else 12.0, 0.45 * ranks) + 1.4)
    axes = figure.subplots()
    from matplotlib.patches import Patch

    if labelled:
        _draw_boxes(axes, schedule, result)
    else:
        axes.imshow(
            _raster(schedule, result),
            aspect="auto",
            interpolation="nearest",
            extent=(0, result.makespan, ranks - 0.5, -0.5),
        )
    named = range(0, ranks, -(-ranks // 64))
    axes.set_yticks(named, [f"rank {rank}" for rank in named])
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, result.makespan)
    axes.set_xlabel("time")
    axes.set_title(title)
    used = {action.kind for actions in schedule for action in actions}
    keys = [Patch(color=color, label=kind.name.lower().replace("_", " ")) for kind, color in COLORS.items() if kind in used]
    figure.legend(handles=keys, loc="outside lower center", ncols=5, frameon=False)
    return _bytes(figure)


def _draw_boxes(axes: "Axes", schedule: Sequence[Sequence[Action]], result: Simulation) -> None:
    """Every action as a box with its number."""
    small = 7 if result.makespan > 40 else 9
    for rank, (actions, spans) in enumerate(zip(schedule, result.timeline, strict=True)):
        axes.broken_barh(
            [(start, end - start) for start, end in spans],
            (rank - 0.43, 0.86),
            facecolors=[COLORS[action.kind] for action in actions],
            edgecolors="white",
            linewidths=0.5,
        )
        for action, (start, end) in zip(actions, spans, strict=True):
            text = str(action.microbatch) if action.backward is None else f"{action.microbatch}/{action.backward.microbatch}"
            axes.text((start + end) / 2, rank, text, ha="center", va="center", fontsize=small, color="white")


def _raster(schedule: Sequence[Sequence[Action]], result: Simulation) -> "NDArray[np.uint8]":
    """Colours [7 x ranks, columns, 3] of a schedule of many actions, which as boxes would take seconds: six rows of pixels and a white
    one for each rank (of more than 200 ranks one row each). An action of four columns or more ends with a white one."""
    import numpy as np

    scale = _PIXELS / result.makespan
    paint = {kind: [int(color[at : at + 2], 16) for at in (1, 3, 5)] for kind, color in COLORS.items()}
    pixels = np.full((len(schedule), _PIXELS, 3), 255, dtype=np.uint8)
    for row, actions, spans in zip(pixels, schedule, result.timeline, strict=True):
        for action, (start, end) in zip(actions, spans, strict=True):
            first, last = int(start * scale), max(int(start * scale) + 1, int(end * scale))
            row[first : last - (last - first >= 4)] = paint[action.kind]
    if len(schedule) > 200:
        return pixels
    rows = np.repeat(pixels, 7, axis=0)
    rows[::7] = 255
    return rows


def model_png(plan: ModelPlan) -> bytes:
    """Active parameters and FLOPs by module, and caches on a logarithmic scale."""
    figure = _figure(13, 4.5)
    left, right = figure.subplots(1, 2)
    shown = [m for m in plan.modules if m.forward_flops_per_token > 0]
    left.barh([m.name for m in shown], [m.forward_flops_per_token / 1e9 for m in shown], color=COLORS[Kind.FORWARD])
    left.invert_yaxis()
    left.set_xlabel("GFLOP per token, forward")
    right.barh(
        [row.name for row in plan.caches], [row.bytes_per_token / 1000 for row in plan.caches], color=COLORS[Kind.BACKWARD]
    )
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xlabel("KB of cache per token, bf16")
    return _bytes(figure)


def train_png(plan: TrainPlan) -> bytes:
    """Where a step's time goes in the best layouts, and the memory of the best one."""
    figure = _figure(14, 5)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    found = [plan.best, *plan.alternatives]
    parts = [
        ("compute", "compute_seconds"),
        ("recomputation", "recompute_seconds"),
        ("all-to-all, exposed", "exposed_all_to_all_seconds"),
        ("tensor parallel", "tensor_parallel_seconds"),
        ("idle kernels", "idle_seconds"),
        ("bubbles", "bubble_seconds"),
        ("gradient sync", "gradient_sync_seconds"),
        ("optimizer", "optimizer_seconds"),
    ]
    start = [0.0] * len(found)
    for name, part in parts:
        size = [getattr(one.step, part) for one in found]
        left.barh([one.description for one in found], size, left=start, label=name)
        start = [one + other for one, other in zip(start, size, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("seconds of a step")
    left.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.3, -0.1), frameon=False)
    memory = {name.removesuffix("_bytes"): size / 1e9 for name, size in vars(plan.best.memory).items()}
    right.barh(list(memory), list(memory.values()), color=COLORS[Kind.BACKWARD_WEIGHT])
    right.invert_yaxis()
    right.set_xlabel("GB per device")
    return _bytes(figure)


def fit_png(title: str, rows: Sequence[FitRow]) -> bytes:
    """The longest context and the speed of every model at every precision; where its weights do not fit there is no bar."""
    figure = _figure(13, 0.9 + 0.3 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row.model}, {row.precision}" for row in rows]
    colors = dict(zip(dict.fromkeys(row.precision for row in rows), COLORS.values(), strict=False))
    paint = [colors[row.precision] for row in rows]
    left.barh(names, [row.most_context_tokens / 1024 for row in rows], color=paint)
    right.barh(names, [row.tokens_per_second if row.fits else 0.0 for row in rows], color=paint)
    left.invert_yaxis()
    left.set_xlabel("longest context, thousands (1,024) of tokens")
    right.set_xlabel(f"tokens a second of one request at {rows[0].context_tokens:,} tokens of context")
    figure.suptitle(title)
    return _bytes(figure)


def serve_png(plan: ServePlan) -> bytes:
    """Speed of a request against the output of a node, over batch sizes."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    axes.plot(
        [row.tokens_per_second_per_request for row in plan.latencies],
        [row.output_tokens_per_second_per_node for row in plan.latencies],
        marker="o",
        color=COLORS[Kind.FORWARD],
    )
    for row in plan.latencies:
        place = (row.tokens_per_second_per_request, row.output_tokens_per_second_per_node)
        text = str(row.batch_per_device) + ("" if row.fits else ", no room")
        axes.annotate(text, place, textcoords="offset points", xytext=(4, 5), fontsize=8, rotation=40)
    axes.set_xlim(0, 1.1 * max(row.tokens_per_second_per_request for row in plan.latencies))  # room for what stands at the points
    axes.set_ylim(0, 1.25 * max(row.output_tokens_per_second_per_node for row in plan.latencies))
    axes.set_xlabel("tokens per second of one request")
    axes.set_ylabel("output tokens per second of a node")
    axes.set_title(f"{plan.hardware}, batch per device at each point")
    return _bytes(figure)


def rl_png(plan: RLPlan) -> bytes:
    """The parts of one rollout cycle."""
    figure = _figure(8, 3)
    axes = figure.subplots()
    start = 0.0
    for name in ("rollout", "reference", "reward", "training"):
        size = getattr(plan, f"{name}_seconds")
        axes.barh(plan.recipe, size, left=start, label=f"{name} {size:.0f} s")
        start += size
    axes.set_xlabel("seconds of a cycle")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3), frameon=False)
    return _bytes(figure)
