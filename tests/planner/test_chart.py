"""Charts: ticks on any range, and what a picture shows, read back from its pixels."""

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from finback.planner.chart import (
    FRAME,
    GRID,
    MARGIN,
    TITLE,
    Axis,
    Box,
    Panel,
    decades,
    linear_axis,
    logarithmic_axis,
    nice_step,
    picture,
    text_width,
    tick_labels,
    ticks,
)

BLUE, RED = "#4c78a8", "#e45756"
Pixels = np.ndarray  # [height, width, 3]
Frame = tuple[int, int, int, int]


def rgb(color: str) -> tuple[int, int, int]:
    return (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16))


def decoded(png: bytes) -> Pixels:
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.array(image)


def runs(line: Pixels, color: str) -> list[tuple[int, int]]:
    """First pixel and end of every run of a colour in a line [length, 3]."""
    here = np.concatenate(([False], (line == rgb(color)).all(axis=1), [False]))
    changes = np.flatnonzero(here[1:] != here[:-1]).tolist()
    return list(zip(changes[::2], changes[1::2], strict=True))


def plots(image: Pixels) -> list[Frame]:
    """Left, top, right and bottom of what each frame surrounds; right and bottom are the first pixels beyond."""
    lines = [(y, run) for y, line in enumerate(image) for run in runs(line, FRAME) if run[1] - run[0] > 100]
    top = lines[0][0]
    return [
        (run[0] + 1, top + 1, run[1] - 1, next(y for y, other in lines if y > top and other[0] <= run[0] and other[1] == run[1]))
        for y, run in lines
        if y == top
    ]


def dark(image: Pixels, frame: Frame | None = None) -> Pixels:
    """Columns of a part of the picture that hold something dark, as words are."""
    left, top, right, bottom = frame or (0, 0, image.shape[1], image.shape[0])
    return left + np.flatnonzero((image[top:bottom, left:right].astype(int).sum(axis=2) < 300).any(axis=0))


@pytest.mark.parametrize("most", [2, 3, 5, 9])
@pytest.mark.parametrize("low", [0.0, 1.0, 7.3, -2.5])
@pytest.mark.parametrize("scale", [3e-300, 1e-9, 1e-4, 0.7, 1.0, 2.0, 5.0, 6.02, 66.0, 99999.0, 1e9, 4.7e15, 1e300])
def test_ticks_are_few_round_and_inside(low: float, scale: float, most: int) -> None:
    high = low + scale if scale > 1e-9 else scale
    low = low if scale > 1e-9 else 0.0
    found = ticks(low, high, most)
    assert len(found) <= most
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in found)
    if most >= 5:
        assert len(found) >= 2
        step = found[1] - found[0]
        assert all(other - one == pytest.approx(step, rel=1e-6) for one, other in pairwise(found))
        assert f"{step:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")
        assert len(ticks(low, high, most)) * 2.6 + 2 >= most, "no more than the rule leaves out"


def test_ticks_are_exact() -> None:
    assert ticks(0.0, 1.0, 11) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert ticks(0.0, 168.0, 9) == [20.0 * count for count in range(9)]
    assert ticks(3.0, 3.0, 5) == [3.0]
    assert ticks(0.0, 0.0, 5) == [0.0]


@pytest.mark.parametrize(
    ("least", "found"), [(1.0, (1, 0)), (1.1, (2, 0)), (2.1, (5, 0)), (5.1, (1, 1)), (0.02, (2, -2)), (17, (2, 1))]
)
def test_the_next_round_number(least: float, found: tuple[int, int]) -> None:
    assert nice_step(least) == found


def test_decades() -> None:
    assert decades(1.0, 1000.0, 9) == [1.0, 10.0, 100.0, 1000.0]
    assert decades(0.03, 20.0, 9) == [0.1, 1.0, 10.0]
    assert decades(1e-9, 1e9, 9) == [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9]
    assert decades(1e-300, 1e300, 5)[0] == 1e-300


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.0, 0.001, 0.002], ["0", "0.001", "0.002"]),
        ([0.0, 0.5, 1.0], ["0", "0.5", "1"]),
        ([0.0, 20000.0, 1e6], ["0", "20,000", "1,000,000"]),
        ([0.0, 5e9, 1e10, 1.5e10], ["0", "5e9", "1e10", "1.5e10"]),
        ([0.0, 5e-9], ["0", "5e-9"]),
        ([0.0], ["0"]),
    ],
)
def test_ticks_in_words(values: list[float], told: list[str]) -> None:
    assert tick_labels(values) == told


@pytest.mark.parametrize("length", [120, 360, 1800])
@pytest.mark.parametrize("high", [1e-9, 0.04, 7.0, 66.0, 124000.0, 9.99e6, 2.3e13, 1e300])
def test_labels_of_ticks_stand_clear_of_each_other(high: float, length: int) -> None:
    for axis in (Axis("", 0.0, high), logarithmic_axis("", [1e-9 * high, high])):
        placed = [(share * length, text_width(text)) for share, text in axis.ticks(length)]
        assert placed
        assert all(at + size / 2 < other - following / 2 for (at, size), (other, following) in pairwise(placed))


def test_axes_of_nothing_but_zeros() -> None:
    assert (linear_axis("", [0.0, 0.0]).low, linear_axis("", [0.0, 0.0]).high) == (0.0, 1.0)
    axis = logarithmic_axis("", [0.0])
    assert (axis.low, axis.high) == (0.1, 1.0)
    assert axis.share(0.0) == 0.0


def test_a_logarithmic_axis_leaves_every_bar_some_length() -> None:
    axis = logarithmic_axis("", [10.0, 31.0, 4000.0])
    assert (axis.low, axis.high) == (1.0, 10000.0)
    assert [axis.share(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0.0, 0.25, 0.5])


def bars(sizes: list[float], names: list[str] | None = None, axis: Axis | None = None) -> Panel:
    names = names or [f"bar {row}" for row in range(len(sizes))]
    boxes = [Box(row, 0.0, size, BLUE) for row, size in enumerate(sizes)]
    return Panel(axis or linear_axis("seconds", sizes), 400, 40 * len(sizes), rows=names, boxes=boxes)


def lengths(image: Pixels, rows: int, color: str = BLUE, plot: int = 0) -> list[int]:
    """Of the bars of one plot, in pixels."""
    left, top, right, bottom = plots(image)[plot]
    middles = [top + int((row + 0.5) * (bottom - top) / rows) for row in range(rows)]
    return [sum(end - start for start, end in runs(image[y, left:right], color)) for y in middles]


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e15])
def test_bars_are_as_long_as_their_values(unit: float) -> None:
    sizes = [3 * unit, 0.0, 1.5 * unit, 0.01 * unit, 1e-9 * unit]
    image = decoded(picture("", [bars(sizes)]))
    left, _, right, _ = plots(image)[0]
    assert right - left == 400
    full = 400 / 1.05
    assert lengths(image, 5) == [round(full), 0, round(full / 2), round(full / 300), 1], "a very short one is seen, too"


def test_parts_of_a_bar_follow_each_other() -> None:
    boxes = [Box(0, 0.0, 1.0, BLUE), Box(0, 1.0, 4.0, RED)]
    image = decoded(picture("", [Panel(Axis("s", 0.0, 5.0), 500, 60, rows=["one"], boxes=boxes)], [("a", BLUE), ("b", RED)]))
    left, top, _, bottom = plots(image)[0]
    assert runs(image[top + 30], BLUE) == [(left, left + 100)]
    assert runs(image[top + 30], RED) == [(left + 100, left + 400)]
    below = [y for y in range(bottom, len(image)) if runs(image[y], BLUE)]
    (blue,), (red,) = runs(image[below[0]], BLUE), runs(image[below[0]], RED)
    name = dark(image, (blue[1], below[0], red[0], below[-1] + 1))
    assert blue[1] < name[0] <= name[-1] < red[0], "the name of a colour stands beside it"


def test_boxes_are_parted_where_that_is_asked() -> None:
    boxes = [Box(0, start, start + 1.0, BLUE) for start in (0.0, 1.0)]
    image = decoded(picture("", [Panel(Axis("s", 0.0, 4.0), 400, 60, rows=["one"], boxes=boxes, separated=True)]))
    left, top, _, _ = plots(image)[0]
    assert runs(image[top + 30], BLUE) == [(left, left + 99), (left + 100, left + 199)]


def test_a_long_label_is_not_cut() -> None:
    name = "a layout with a very long description" * 6
    short, long = (decoded(picture("", [bars([1.0, 2.0], names=["b", first])])) for first in ("b", name))
    left, top, right, bottom = plots(long)[0]
    assert right - left == 400, "the plot keeps its size"
    assert long.shape[1] - short.shape[1] == text_width(name) - text_width("b"), "and the picture grows"
    words = dark(long, (0, top, left - 7, bottom))  # all but the ticks
    assert words[0] >= MARGIN - 1
    assert words[-1] < left - 7
    assert words[-1] - words[0] == pytest.approx(text_width(name), abs=4)


def test_a_long_title_label_or_legend_is_not_cut() -> None:
    words = "many words that say it at length " * 5
    for told in (
        picture(words, [bars([1.0])]),
        picture("", [bars([1.0], axis=Axis(words, 0.0, 1.0))]),
        picture("", [bars([1.0])], [(words, RED), ("b", BLUE)]),
    ):
        image = decoded(told)
        assert image.shape[1] > text_width(words)
        words_at = dark(image)
        assert words_at[0] >= MARGIN - 1
        assert words_at[-1] <= image.shape[1] - MARGIN + 1


def test_a_number_at_the_end_of_an_axis_is_not_cut() -> None:
    image = decoded(picture("", [bars([1.0], axis=Axis("s", 0.0, 2e6))]))
    words = dark(image)
    assert plots(image)[0][2] + text_width("2,000,000") / 2 == pytest.approx(words[-1], abs=3)
    assert words[-1] <= image.shape[1] - MARGIN + 1


def test_plots_side_by_side_do_not_meet() -> None:
    image = decoded(picture("both", [bars([1.0]), bars([2e15], names=["a name of some length"])]))
    first, second = plots(image)
    words = dark(image, (first[2] + 1, first[1], second[0] - 7, first[3]))
    assert first[2] + MARGIN < words[0] <= words[-1] < second[0] - 7


def test_of_many_rows_some_are_named() -> None:
    panel = Panel(Axis("time", 0.0, 1.0), 300, 1000, rows=[f"rank {rank}" for rank in range(1000)])
    named = panel.side_labels()
    assert [text for _, text in named[:3]] == ["rank 0", "rank 20", "rank 40"]
    assert all(1000 * (other - one) >= 17 for (one, _), (other, _) in pairwise(named))


@pytest.mark.parametrize(("width", "written"), [(400, True), (40, True), (12, False)])
def test_a_number_stands_in_its_box_or_is_left_out(width: int, written: bool) -> None:
    """A cut one would be another micro-batch's."""
    boxes = [Box(0, 0.0, width / 400, BLUE, "128")]
    image = decoded(picture("", [Panel(Axis("s", 0.0, 1.0), 400, 60, rows=["one"], boxes=boxes)]))
    left, top, _, _ = plots(image)[0]
    inside = image[top + 10 : top + 50, left : left + width]
    assert (inside[:, :, 0].max() > 200) is np.bool_(written)


def test_a_curve_goes_through_its_points() -> None:
    points = [(10.0, 1.0, "1"), (5.0, 5.0, "16"), (2.0, 6.0, "64")]
    panel = Panel(linear_axis("speed", [10.0], 1.1), 440, 400, y=linear_axis("output", [5.0], 2.0), points=points, color=BLUE)
    image = decoded(picture("", [panel]))
    left, _, _, bottom = plots(image)[0]
    for (x, y, _), (following, above, _) in pairwise(points):
        for share in (0.0, 0.5, 1.0):
            across, up = x + share * (following - x), y + share * (above - y)
            assert tuple(image[bottom - round(40 * up), left + round(40 * across)]) == rgb(BLUE)


def test_labels_of_a_crowd_of_points_stand_clear_of_each_other() -> None:
    points = [(5.0 + 0.01 * at, 3.0, f"{at}00, no room") for at in range(5)]
    panel = Panel(linear_axis("speed", [10.0]), 400, 400, y=linear_axis("output", [10.0]), points=points)
    image = decoded(picture("", [panel]))
    left, top, right, bottom = plots(image)[0]
    words = image[top:bottom, left:right].astype(int).sum(axis=2) < 450
    diagonals = [np.diagonal(words[::-1], offset).any() for offset in range(-len(words), len(words))]  # they rise by 45 degrees
    starts = sum(not one and other for one, other in pairwise(diagonals))
    assert starts >= 5


def test_nothing_but_zeros_is_drawn() -> None:
    image = decoded(picture("", [bars([0.0, 0.0])]))
    assert lengths(image, 2) == [0, 0]
    left, _, right, bottom = plots(image)[0]
    assert len(dark(image, (left, bottom + 7, right, bottom + 24))) > 10, "the axis has its numbers"
    assert runs(image[bottom - 1], GRID)


def test_letters_are_measured_as_they_are_drawn() -> None:
    words = dark(decoded(picture("W" * 40, [bars([1.0])])), (0, 0, 900, MARGIN + 20))
    assert words[-1] - words[0] == pytest.approx(text_width("W" * 40, TITLE), abs=4)
