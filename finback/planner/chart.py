"""Charts as PNG files: bars in named rows, or a curve. Drawn with Pillow, which is imported only where one is made.

Lengths are pixels. A plot is as large as asked, and the picture grows by what the words around it need, so that none is cut off.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from finback.config import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

INK, FRAME, GRID = "#222222", "#8c8c8c", "#e4e4e4"
TITLE, TEXT, SMALL = 19, 15, 13  # sizes of letters
BOX_TEXT = (14, 12, 10)  # in boxes, from the one that is best read
LINE = 20  # from one line of words to the next
MARGIN = 16  # around the picture, and twice between plots
TICK = 5
SWATCH = 26  # of colour in a legend
FINE = 4  # letters and curves are drawn this much larger and reduced, for smooth edges and even spaces


def nice_step(least: float) -> tuple[int, int]:
    """The smallest number that is 1, 2 or 5 times a power of ten and at least `least` > 0: (factor, exponent)."""
    number, exponent = f"{least:.15e}".split("e")
    return next(((factor, int(exponent)) for factor in (1, 2, 5) if factor > float(number) - 1e-9), (1, int(exponent) + 1))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Up to `most` >= 2 multiples of 1, 2 or 5 times a power of ten, all from `low` to `high`; `low` alone if they are equal."""
    if not high > low:
        return [low]
    factor, exponent = nice_step((high - low) / (most - 0.5))  # shorter ones could leave room for one more
    up, down = factor * 10 ** max(0, exponent), 10 ** max(0, -exponent)  # a quotient of integers is 0.3 where 3 x 0.1 is not
    first, last = math.ceil(low / (up / down) - 1e-9), math.floor(high / (up / down) + 1e-9)
    return [count * up / down for count in range(first, last + 1)]


def decades(low: float, high: float, most: int) -> list[float]:
    """Up to `most` powers of ten from `low` > 0 to `high`: each, or each second, third, ..."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [float(f"1e{exponent}") for exponent in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks of one axis in words: in full, or with exponents where one of them is very large or very small."""
    if all(1e-4 <= abs(value) < 1e7 for value in values if value):
        return [f"{value:,.10g}" for value in values]
    told = [f"{value:.6e}".split("e") for value in values]
    return [f"{number.rstrip('0').rstrip('.')}e{int(exponent)}" if float(number) else "0" for number, exponent in told]


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high` along one side of a plot."""

    label: str
    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far along the side a value stands, from 0 to 1."""
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low) if value > self.low else 0.0

    def ticks(self, length: int, upright: bool = False) -> list[tuple[float, str]]:
        """Ticks as shares of the side and their labels, no more than stand clear of each other on a side of this length."""
        for most in range(9, 1, -1):
            values = (decades if self.logarithmic else ticks)(self.low, self.high, most)
            labels = tick_labels(values)
            if sum(2 * LINE if upright else text_width(label) + LINE for label in labels) <= length:
                break
        return [(self.share(value), label) for value, label in zip(values, labels, strict=True)]


def linear_axis(label: str, values: Sequence[float], room: float = 1.05) -> Axis:
    """From 0 to `room` times the largest value, or to 1 where all are 0."""
    return Axis(label, 0.0, room * max(values) or 1.0)


def logarithmic_axis(label: str, values: Sequence[float]) -> Axis:
    """From a power of ten below all values that are not 0 to one that none is above."""
    sizes = [value for value in values if value > 0] or [1.0]
    low, high = math.ceil(math.log10(min(sizes))) - 1, math.ceil(math.log10(max(sizes)))
    return Axis(label, 10.0**low, 10.0**high, logarithmic=True)


class Box(NamedTuple):
    """A bar, or a part of one, in a row counted from the top; `text` stands in it where there is room."""

    row: int
    start: float
    stop: float
    color: str
    text: str = ""


@dataclass(frozen=True)
class Panel:
    """One plot: boxes in `rows`, whose names stand at the left; or, over a vertical axis `y`, a curve through (x, y, label)."""

    x: Axis
    width: int
    height: int
    rows: Sequence[str] = ()
    boxes: Sequence[Box] = ()
    separated: bool = False
    """Whether boxes of some width end with a white column."""
    y: Axis | None = None
    points: Sequence[tuple[float, float, str]] = ()
    color: str = INK

    @property
    def columns(self) -> int:
        """The width, grown to that of the label below."""
        return max(self.width, text_width(self.x.label))

    def side_labels(self) -> list[tuple[float, str]]:
        """What stands at the left: shares of the height from the top, and text; of many rows each second, fifth, tenth, ..."""
        if self.y:
            return [(1 - share, text) for share, text in self.y.ticks(self.height, upright=True)]
        factor, exponent = nice_step(max(1.0, (TEXT + 2) * len(self.rows) / self.height))
        named = range(0, len(self.rows), factor * 10**exponent)
        return [((row + 0.5) / len(self.rows), self.rows[row]) for row in named if self.rows[row]]

    def margins(self) -> tuple[int, int]:
        """What the words take at the left of the plot and beyond its right end."""
        side = max((text_width(text) + TICK + 4 for _, text in self.side_labels()), default=0) + (LINE if self.y else 0)
        ticks = [(share * self.columns, text_width(text) / 2) for share, text in self.x.ticks(self.columns)]
        right = max(at + half - self.columns for at, half in ticks)
        return math.ceil(max(side, *(half - at for at, half in ticks))), math.ceil(max(0, right))


def picture(title: str, panels: Sequence[Panel], keys: Sequence[tuple[str, str]] = ()) -> bytes:
    """A PNG file: the title over panels side by side, and below them a legend of names and colours.

    Raises:
        InputError: Pillow is missing.
    """
    lefts, right = [], MARGIN
    for panel in panels:
        before, after = panel.margins()
        lefts.append(right + before)
        right = lefts[-1] + panel.columns + after + 2 * MARGIN
    key_widths = [SWATCH + 8 + text_width(name) + 24 for name, _ in keys]
    width = max(right - MARGIN, 2 * MARGIN + max(text_width(title, TITLE), sum(key_widths)))
    top = MARGIN + (TITLE + MARGIN // 2 if title else 0)
    bottom = top + max(panel.height for panel in panels) + TICK + 3 * LINE
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, bottom + (LINE if keys else 0)), "white")
    draw = ImageDraw.Draw(image)
    middle = (lefts[0] + lefts[-1] + panels[-1].columns) / 2

    def beginning(size: float) -> int:
        """Where a line of this width begins: centred over the plots, or as nearly as the picture's ends allow."""
        return round(max(MARGIN, min(middle - size / 2, width - MARGIN - size)))

    _write(image, title, beginning(text_width(title, TITLE)), MARGIN + TITLE / 2, 0.0, TITLE)
    for left, panel in zip(lefts, panels, strict=True):
        draw.rectangle((left - 1, top - 1, left + panel.columns, top + panel.height), outline=FRAME)
        image.paste(_plot(panel), (left, top))
        _write_axes(image, panel, left, top)
    x = beginning(sum(key_widths))
    for (name, color), size in zip(keys, key_widths, strict=True):
        draw.rectangle((x, bottom - 6, x + SWATCH - 1, bottom + 6), color)
        _write(image, name, x + SWATCH + 8, bottom, 0.0)
        x += size
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # the usual level takes twice the time
    return buffer.getvalue()


def _write_axes(image: "Image", panel: Panel, left: int, top: int) -> None:
    """Ticks and words below and at the left of a plot with this corner."""
    from PIL import ImageDraw

    draw, base = ImageDraw.Draw(image), top + panel.height
    for share, text in panel.x.ticks(panel.columns):
        x = left + round(share * panel.columns)
        draw.line((x, base, x, base + TICK), FRAME)
        _write(image, text, x, base + TICK + LINE / 2, 0.5)
    _write(image, panel.x.label, left + panel.columns / 2, base + TICK + 1.5 * LINE, 0.5)
    for share, text in panel.side_labels():
        y = top + round(share * panel.height)
        draw.line((left - 1 - TICK, y, left - 1, y), FRAME)
        _write(image, text, left - TICK - 4, y, 1.0)
    if panel.y:
        _write(image, panel.y.label, left - panel.margins()[0] + LINE / 2, top + panel.height / 2, 0.5, degrees=90)


def _plot(panel: Panel) -> "Image":
    """What is inside the frame, over light lines at the ticks."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (panel.columns, panel.height), "white")
    draw = ImageDraw.Draw(image)
    for share, _ in panel.x.ticks(panel.columns):
        draw.line((round(share * panel.columns), 0, round(share * panel.columns), panel.height), GRID)
    if panel.y is None:
        _draw_boxes(image, panel)
        return image
    for share, _ in panel.side_labels():
        draw.line((0, round(share * panel.height), panel.columns, round(share * panel.height)), GRID)
    _draw_curve(
        image, panel, [(panel.x.share(x) * panel.columns, (1 - panel.y.share(y)) * panel.height) for x, y, _ in panel.points]
    )
    return image


def _draw_boxes(image: "Image", panel: Panel) -> None:
    """Every box that is longer than nothing, at least a column wide. Texts are of the largest size in which all have room; if there is
    none, those that have no room in the smallest are left out: a number that is cut would be another one."""
    from PIL import ImageDraw

    draw, columns, row = ImageDraw.Draw(image), panel.columns, panel.height / len(panel.rows)
    gap = round(0.18 * row)
    texts = []
    for box in panel.boxes:
        if box.stop <= box.start:
            continue
        first = min(round(columns * panel.x.share(box.start)), columns - 1)
        last = max(first, round(columns * panel.x.share(box.stop)) - 1)
        upper, lower = round(box.row * row) + gap // 2, round((box.row + 1) * row) - (gap + 1) // 2 - 1
        draw.rectangle((first, upper, last - (panel.separated and last - first >= 3), max(upper, lower)), box.color)
        if box.text:
            texts.append((box.text, last - first - 3, (first + last) / 2, (upper + lower + 1) / 2))
    sizes = [size for size in BOX_TEXT if size < row - gap]
    size = next((size for size in sizes if all(text_width(text, size) <= room for text, room, *_ in texts)), BOX_TEXT[-1])
    for text, room, x, y in texts if sizes else ():
        if text_width(text, size) <= room:
            _write(image, text, x, y, 0.5, size, "white")


def _draw_curve(image: "Image", panel: Panel, places: Sequence[tuple[float, float]]) -> None:
    """The places joined in their order by a line with a disc at each, and their labels, which rise to the right."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (FINE * panel.columns, FINE * panel.height))
    draw = ImageDraw.Draw(mask)
    draw.line([(FINE * x, FINE * y) for x, y in places], 255, 2 * FINE, joint="curve")
    for x, y in places:
        draw.ellipse([FINE * side for side in (x - 5, y - 5, x + 5, y + 5)], 255)
    image.paste(panel.color, (0, 0), mask.reduce(FINE))
    labels = [(x, y, text) for (x, y), (*_, text) in zip(places, panel.points, strict=True)]
    clear = math.inf
    for x, y, text in sorted(labels, key=lambda label: -label[0] - label[1]):  # from the lower right
        y = min(y, clear - x)  # lifted clear of the label before: along one, x + y is the same
        clear = x + y - 1.5 * SMALL
        rise = (8 + text_width(text, SMALL) / 2) * math.sqrt(0.5)
        _write(image, text, x + rise, y - rise, 0.5, SMALL, degrees=45)


@cache
def _font(size: int) -> "FreeTypeFont":
    """Letters of this size; every picture begins by measuring some."""
    if find_spec("PIL") is None:
        raise InputError("--png needs Pillow, which is in the extra report: pip install 'finback[report]'")
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # the other kind comes only where no size is asked for
    return font


@cache
def text_width(text: str, size: int = TEXT) -> int:
    """Pixels that a text takes."""
    return math.ceil(_font(FINE * size).getlength(text) / FINE)


@cache
def _letters(text: str, size: int, degrees: int) -> "Image":
    """A text as coverage from 0 to 255, rising to the right by so many degrees."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (FINE * max(1, text_width(text, size)), FINE * 3 * size // 2))
    ImageDraw.Draw(mask).text((0, mask.height / 2), text, 255, _font(FINE * size), "lm")
    return mask.rotate(degrees, expand=True).reduce(FINE)


def _write(
    image: "Image", text: str, x: float, y: float, anchor: float, size: int = TEXT, color: str = INK, degrees: int = 0
) -> None:
    """A text centred on `y`, which starts at `x`, is centred on it or ends there: anchor 0, 0.5 or 1."""
    mask = _letters(text, size, degrees)
    image.paste(color, (round(x - anchor * mask.width), round(y - mask.height / 2)), mask)
