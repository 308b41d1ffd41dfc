"""The planner's six pictures, read back from their pixels, and what drawing them needs and does not."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finback.parallel.schedule import SCHEDULES, Costs, Kind, simulate
from finback.planner import drawing
from finback.planner.fit import fit_table
from finback.planner.hardware import HARDWARE
from finback.planner.inference import Unit
from finback.planner.layout import Layout
from finback.planner.model import plan_model
from finback.planner.rl import R1_ZERO, plan_rl
from finback.planner.serve import plan_serve
from finback.planner.train import plan_train
from finback.presets import v3_671b
from tests.planner.test_chart import dark, decoded, lengths, plots, rgb, runs

ROOT = Path(__file__).parents[2]
V3, H800 = v3_671b().model, HARDWARE["h800"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(4, 8), (20, 60)], ids=["labelled", "large"])
def test_every_action_has_its_colour_at_its_time(name: str, stages: int, microbatches: int) -> None:
    schedule = SCHEDULES[name](stages, microbatches)
    result = simulate(schedule, Costs(forward=1.0, backward_input=1.5, backward_weight=0.5))
    image = decoded(drawing.schedule_png("title", schedule, result))
    left, top, right, bottom = plots(image)[0]
    row, scale = (bottom - top) // len(schedule), (right - left) / result.makespan
    colors = [rgb(color) for color in drawing.COLORS.values()]
    for rank, (actions, spans) in enumerate(zip(schedule, result.timeline, strict=True)):
        line = image[top + rank * row + row // 4]  # above the numbers
        waiting = np.full(len(line), True)
        for action, (start, end) in zip(actions, spans, strict=True):
            first, last = left + round(start * scale), left + round(end * scale)
            waiting[first:last] = False
            drawn = line[first : last - 1]  # the last column may be white
            assert (drawn == rgb(drawing.COLORS[action.kind])).all(), (rank, action)
        assert not {tuple(pixel) for pixel in line[waiting].tolist()} & set(colors), "waiting has no colour"
        assert not (image[top + (rank + 1) * row - 1, left:right] == rgb(drawing.COLORS[Kind.FORWARD])).all(axis=1).any()


def test_the_legend_has_the_kinds_that_occur() -> None:
    schedule = SCHEDULES["zb1p"](4, 8)
    image = decoded(drawing.schedule_png("zb1p", schedule, simulate(schedule)))
    legend = image[plots(image)[0][3] + 30 :]
    found = [kind.value for kind, color in drawing.COLORS.items() if (legend == rgb(color)).all(axis=2).any()]
    assert found == ["F", "I", "W"]


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 3), (1000, 1), (1000, 3), (2, 250)])
def test_few_and_many_ranks(stages: int, microbatches: int) -> None:
    schedule = SCHEDULES["one_f_one_b"](stages, microbatches)
    image = decoded(drawing.schedule_png("title", schedule, simulate(schedule)))
    left, top, right, bottom = plots(image)[0]
    row = (bottom - top) // stages
    for rank in range(stages):
        line = image[top + rank * row + row // 4, left:right]
        forward, backward = (runs(line, drawing.COLORS[kind]) for kind in (Kind.FORWARD, Kind.BACKWARD))
        assert forward, rank
        assert backward, rank
        assert forward[0][0] < backward[0][0]
        assert backward[-1][1] > forward[-1][1]


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_times_of_any_size(unit: float) -> None:
    schedule = SCHEDULES["one_f_one_b"](2, 4)
    pictures = [decoded(drawing.schedule_png("title", schedule, simulate(schedule, Costs(at, at, at)))) for at in (1.0, unit)]
    inside = [image[frame[1] : frame[3], frame[0] : frame[2]] for image in pictures for frame in plots(image)]
    shown = [(image == rgb(drawing.COLORS[Kind.BACKWARD])).all(axis=2) for image in inside]
    assert shown[0].any()
    assert (shown[0] == shown[1]).all()


def test_the_bars_of_a_model() -> None:
    plan = plan_model(V3, 4096)
    image = decoded(drawing.model_png(plan))
    shown = [m.forward_flops_per_token for m in plan.modules if m.forward_flops_per_token > 0]
    found = lengths(image, len(shown))
    assert [size / max(found) for size in found] == pytest.approx([size / max(shown) for size in shown], abs=2 / max(found))
    assert len(plots(image)) == 2


def test_the_bars_of_a_training_plan() -> None:
    plan = plan_train(V3, H800, Layout(2048), frozenset({"pp", "ep", "schedule", "recompute"}), tokens=1e12)
    image = decoded(drawing.train_png(plan))
    rows = 1 + len(plan.alternatives)
    compute, bubbles = (lengths(image, rows, color) for color in (drawing.PARTS[0], drawing.PARTS[5]))
    for one, of_compute, of_bubbles in zip([plan.best, *plan.alternatives], compute, bubbles, strict=True):
        assert of_bubbles / of_compute == pytest.approx(one.step.bubble_seconds / one.step.compute_seconds, abs=2 / of_compute)
    sizes = list(vars(plan.best.memory).values())
    found = lengths(image, len(sizes), drawing.COLORS[Kind.BACKWARD_WEIGHT], plot=1)
    assert [size / max(found) for size in found] == pytest.approx([size / max(sizes) for size in sizes], abs=2 / max(found))


def test_what_does_not_fit_has_no_bar() -> None:
    rows = fit_table(HARDWARE["rtx4090"], 65536)
    assert any(row.most_context_tokens > 0 and not row.fits for row in rows)
    image = decoded(drawing.fit_png("RTX 4090", rows))
    colors = dict(zip(("bf16", "fp8", "int4"), drawing.COLORS.values(), strict=False))
    for precision, color in colors.items():
        context, speed = (lengths(image, len(rows), color, plot) for plot in (0, 1))
        for row, of_context, of_speed in zip(rows, context, speed, strict=True):
            assert (of_context > 0) == (row.precision == precision and row.most_context_tokens > 0)
            assert (of_speed > 0) == (row.precision == precision and row.fits)
    nothing = [replace(row, most_context_tokens=0, fits=False) for row in rows]
    image = decoded(drawing.fit_png("nothing", nothing))
    assert all(lengths(image, len(rows), color) == [0] * len(rows) for color in colors.values())


def test_the_curve_of_serving() -> None:
    plan = plan_serve(V3, H800, Unit(ep=32, redundant_experts=32), Unit(ep=144, redundant_experts=32))
    crowded = [replace(row, fits=False, batch_per_device=10**9) for row in plan.latencies]
    for shown in (plan, replace(plan, latencies=crowded), replace(plan, latencies=plan.latencies[:1])):
        image = decoded(drawing.serve_png(shown))
        left, top, right, bottom = plots(image)[0]
        speeds = [row.tokens_per_second_per_request for row in shown.latencies]
        for speed in speeds:
            x = left + round((right - left) * speed / (1.1 * max(speeds)))
            assert (image[top:bottom, x] == rgb(drawing.COLORS[Kind.FORWARD])).all(axis=1).any(), speed
        assert len(dark(image, (left, top, right, top + 3))) == 0, "no label reaches the frame"


def test_the_parts_of_a_cycle() -> None:
    plan = plan_rl(V3, H800, Layout(512, ep=32), Unit(ep=32), R1_ZERO, free=frozenset({"recompute"}))
    image = decoded(drawing.rl_png(plan))
    parts = [plan.rollout_seconds, plan.reference_seconds, plan.reward_seconds, plan.training_seconds]
    found = [lengths(image, 1, color)[0] for color in drawing.PARTS[:4]]
    assert [size / sum(found) for size in found] == pytest.approx([size / sum(parts) for size in parts], abs=2 / sum(found))


PICTURES = [
    ["model", "v3-671b"],
    ["train", "v3-671b", "--pp", "16", "--ep", "64", "--schedule", "dualpipe"],
    ["rl", "v3-671b"],
    ["serve", "v3-671b"],
    ["fit", "rtx4090"],
    ["schedule", "dualpipe", "--stages", "8", "--microbatches", "20"],
    ["schedule", "dualpipe", "--stages", "16", "--microbatches", "64"],
]


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_pictures_are_drawn_without_what_takes_long_to_import(tmp_path: Path) -> None:
    """matplotlib alone takes half a second, and every answer of the planner less than one."""
    done = run(f"""
import sys
from finback.cli import main
for at, words in enumerate({PICTURES!r}):
    assert main(["plan", *words, "--json", "--png", {str(tmp_path)!r} + f"/{{at}}.png"]) == 0
slow = {{"matplotlib", "numpy", "torch"}} & sys.modules.keys()
sys.exit(f"imported {{slow}}" if slow else 0)
""")
    assert done.returncode == 0, done.stderr
    for at in range(len(PICTURES)):
        with Image.open(tmp_path / f"{at}.png") as image:
            assert (image.format, image.mode) == ("PNG", "RGB")


@pytest.mark.parametrize("words", PICTURES[:6], ids=lambda words: words[0])
def test_a_missing_pillow_is_told(words: list[str], tmp_path: Path) -> None:
    plan = ["plan", *words, "--png", str(tmp_path / "plan.png")]
    done = run(f"import sys; sys.modules['PIL'] = None; from finback.cli import main; sys.exit(main({plan!r}))")
    assert done.returncode == 2
    assert done.stderr == "finback plan: --png needs Pillow, which is in the extra report: pip install 'finback[report]'\n"
    assert list(tmp_path.iterdir()) == []
