"""Schedules and plans as pictures: letters for a terminal, PNG files for everything else."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from finback.parallel.schedule import Action, Kind, Simulation
from finback.planner.chart import Axis, Box, Panel, linear_axis, logarithmic_axis, picture, text_width
from finback.planner.fit import FitRow
from finback.planner.model import ModelPlan
from finback.planner.rl import RLPlan
from finback.planner.serve import ServePlan
from finback.planner.train import TrainPlan

COLORS = {
    Kind.FORWARD: "#4c78a8",
    Kind.BACKWARD: "#f58518",
    Kind.BACKWARD_INPUT: "#e45756",
    Kind.BACKWARD_WEIGHT: "#72b7b2",
    Kind.OVERLAPPED: "#9d6fb0",
}
PARTS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
"""Colours of the parts of a time, in their order."""
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


MOST_LABELS = 1000
"""Actions of a schedule up to which each is drawn with its micro-batch: more would be unreadable."""


def schedule_png(title: str, schedule: Sequence[Sequence[Action]], result: Simulation) -> bytes:
    """The timeline of every rank; the number in a box is its micro-batch, in a pair those of forward and backward. Large schedules
    have no numbers."""
    ranks = len(schedule)
    labelled = sum(map(len, schedule)) <= MOST_LABELS
    boxes = [
        Box(rank, start, end, COLORS[action.kind], _numbers(action) if labelled else "")
        for rank, (actions, spans) in enumerate(zip(schedule, result.timeline, strict=True))
        for action, (start, end) in zip(actions, spans, strict=True)
    ]
    used = {action.kind for actions in schedule for action in actions}
    keys = [(kind.name.lower().replace("_", " "), color) for kind, color in COLORS.items() if kind in used]
    panel = Panel(
        Axis("time", 0.0, result.makespan),
        width=1800,
        height=ranks * max(1, min(54, (3600 if labelled else 1440) // ranks)),
        rows=[f"rank {rank}" for rank in range(ranks)],
        boxes=boxes,
        separated=True,
    )
    return picture(title, [panel], keys)


def _numbers(action: Action) -> str:
    return str(action.microbatch) if action.backward is None else f"{action.microbatch}/{action.backward.microbatch}"


def model_png(plan: ModelPlan) -> bytes:
    """FLOPs by module, and caches on a logarithmic scale."""
    flops = {m.name: m.forward_flops_per_token / 1e9 for m in plan.modules if m.forward_flops_per_token > 0}
    caches = {row.name: row.bytes_per_token / 1000 for row in plan.caches}
    left = _bars(linear_axis("GFLOP per token, forward", [*flops.values()]), flops, COLORS[Kind.FORWARD], 540)
    right = _bars(logarithmic_axis("KB of cache per token, bf16", [*caches.values()]), caches, COLORS[Kind.BACKWARD], 540)
    return picture("", [left, right])


def _bars(axis: Axis, sizes: Mapping[str, float], color: str, width: int) -> Panel:
    """One bar for each name."""
    boxes = [Box(row, axis.low, size, color) for row, size in enumerate(sizes.values())]
    return Panel(axis, width, 440, rows=list(sizes), boxes=boxes)


def train_png(plan: TrainPlan) -> bytes:
    """Where a step's time goes in the best layouts, and the memory of the best one."""
    found = [plan.best, *plan.alternatives]
    parts = {
        "compute": "compute_seconds",
        "recomputation": "recompute_seconds",
        "all-to-all, exposed": "exposed_all_to_all_seconds",
        "tensor parallel": "tensor_parallel_seconds",
        "idle kernels": "idle_seconds",
        "bubbles": "bubble_seconds",
        "gradient sync": "gradient_sync_seconds",
        "optimizer": "optimizer_seconds",
    }
    boxes = []
    for row, one in enumerate(found):
        boxes += _stacked(row, [getattr(one.step, part) for part in parts.values()])
    left = Panel(
        linear_axis("seconds of a step", [box.stop for box in boxes]),
        width=720,
        height=440,
        rows=[one.description for one in found],
        boxes=boxes,
    )
    memory = {name.removesuffix("_bytes"): size / 1e9 for name, size in vars(plan.best.memory).items()}
    right = _bars(linear_axis("GB per device", [*memory.values()]), memory, COLORS[Kind.BACKWARD_WEIGHT], 360)
    return picture("", [left, right], list(zip(parts, PARTS, strict=True)))


def _stacked(row: int, sizes: Sequence[float]) -> list[Box]:
    """One bar of parts after each other, in the colours of `PARTS`."""
    stops = list(accumulate(sizes))
    return [Box(row, start, stop, color) for start, stop, color in zip([0.0, *stops], stops, PARTS, strict=False)]


def fit_png(title: str, rows: Sequence[FitRow]) -> bytes:
    """The longest context and the speed of every model at every precision; where its weights do not fit there is no bar."""
    colors = dict(zip(dict.fromkeys(row.precision for row in rows), COLORS.values(), strict=False))
    speed = f"tokens a second of one request at {rows[0].context_tokens:,} tokens of context"
    panels = []
    for label, names, sizes in (
        (
            "longest context, thousands (1,024) of tokens",
            [f"{row.model}, {row.precision}" for row in rows],
            [row.most_context_tokens / 1024 for row in rows],
        ),
        (speed, [""] * len(rows), [row.tokens_per_second if row.fits else 0.0 for row in rows]),
    ):
        boxes = [Box(at, 0.0, size, colors[row.precision]) for at, (row, size) in enumerate(zip(rows, sizes, strict=True))]
        panels.append(Panel(linear_axis(label, sizes), 620, 34 * len(rows), rows=names, boxes=boxes))
    return picture(title, panels)


def serve_png(plan: ServePlan) -> bytes:
    """Speed of a request against the output of a node, over batch sizes."""
    speeds = [row.tokens_per_second_per_request for row in plan.latencies]
    outputs = [row.output_tokens_per_second_per_node for row in plan.latencies]
    labels = [f"{row.batch_per_device}{'' if row.fits else ', no room'}" for row in plan.latencies]
    rise = 80 + 0.7 * max(text_width(label) for label in labels)  # of labels over points, where several points crowd
    panel = Panel(
        linear_axis("tokens per second of one request", speeds, room=1.1),
        width=840,
        height=500,
        y=linear_axis("output tokens per second of a node", outputs, room=500 / (500 - rise)),
        points=list(zip(speeds, outputs, labels, strict=True)),
        color=COLORS[Kind.FORWARD],
    )
    return picture(f"{plan.hardware}, batch per device at each point", [panel])


def rl_png(plan: RLPlan) -> bytes:
    """The parts of one rollout cycle."""
    sizes = {name: getattr(plan, f"{name}_seconds") for name in ("rollout", "reference", "reward", "training")}
    axis = linear_axis("seconds of a cycle", [sum(sizes.values())])
    panel = Panel(axis, width=860, height=180, rows=[plan.recipe], boxes=_stacked(0, [*sizes.values()]))
    keys = [(f"{name} {size:.0f} s", color) for (name, size), color in zip(sizes.items(), PARTS, strict=False)]
    return picture("", [panel], keys)
