"""Heat maps of blame: rows are units, columns are steps. A bounded history and its picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torchbp.tables import plain_text

if TYPE_CHECKING:
    from PIL import Image as PillowImage

Array = NDArray[np.float64]
Image = NDArray[np.uint8]

CULPRIT = (214, 88, 0)
NEUTRAL = (247, 247, 247)
HELPER = (18, 98, 178)
NAN = (255, 0, 255)

# TensorBoard shows pictures in cards of about 350 pixels: the picture is narrow and the letters
# large, so that they can still be read there.
PLOT_LEFT, PLOT_TOP, PLOT_WIDTH = 52, 54, 512
_RIGHT, _BOTTOM = 28, 100
IMAGE_WIDTH = PLOT_LEFT + PLOT_WIDTH + _RIGHT
_LEGEND_WIDTH, _LEGEND_HEIGHT = 216, 14
_INK, _FAINT = (40, 40, 40), (110, 110, 110)
_FONT_SIZE = 15

# The outermost per cent of the cells is drawn saturated, so that one wild step, often the first
# of a training, does not bleach all others.
_LIMIT_QUANTILE = 0.99


@dataclass
class History:
    """Blame per sample of one layer's units over time, in at most ``max_columns`` columns.

    When the columns are used up, neighbours are merged two by two, and from then on each column
    takes twice as many entries: memory stays at ``4 * units * max_columns`` bytes however long
    the training.

    Attributes:
        units: number of units.
        max_columns: most columns kept; even, at least 2.
        entries_per_column: how many entries a full column holds.
        steps: first step of each column, and the last step seen.
    """

    units: int
    max_columns: int
    entries_per_column: int = 1
    last_step: int = 0
    steps: list[int] = field(default_factory=list)
    _sums: list[NDArray[np.float32]] = field(default_factory=list)
    _samples: list[int] = field(default_factory=list)
    _entries_in_last: int = 0

    def add(self, step: int, blame: Array, samples: int) -> None:
        """Appends one entry.

        Args:
            step: training step, larger than any before.
            blame: ``[units]`` signed blame summed over the samples.
            samples: how many samples.
        """
        if self._entries_in_last == self.entries_per_column or not self.steps:
            if len(self.steps) == self.max_columns:
                self._merge_neighbours()
            self.steps.append(step)
            self._sums.append(np.zeros(self.units, dtype=np.float32))
            self._samples.append(0)
            self._entries_in_last = 0
        self._sums[-1] += blame
        self._samples[-1] += samples
        self._entries_in_last += 1
        self.last_step = step

    def _merge_neighbours(self) -> None:
        self._sums = [a + b for a, b in zip(self._sums[::2], self._sums[1::2], strict=True)]
        self._samples = [
            a + b for a, b in zip(self._samples[::2], self._samples[1::2], strict=True)
        ]
        self.steps = self.steps[::2]
        self.entries_per_column *= 2

    def matrix(self) -> Array:
        """``[units, columns]`` blame per sample, averaged over the entries of each column."""
        return np.stack(self._sums, axis=1) / np.maximum(np.asarray(self._samples), 1)


def largest_units(matrix: Array, count: int) -> NDArray[np.intp]:
    """Rows of ``[units, columns]`` with the largest sum of absolute values, largest first.

    NaN counts as nothing; ties keep the order of the units.
    """
    size = np.nansum(np.abs(matrix), axis=1)
    return np.argsort(-size, kind="stable")[:count]


def colour_limit(matrix: Array) -> float:
    """The absolute value drawn in full colour: the 99 % quantile of the finite cells, or 1."""
    size = np.abs(matrix[np.isfinite(matrix)])
    limit = float(np.quantile(size, _LIMIT_QUANTILE)) if size.size else 0.0
    return limit or float(size.max(initial=0.0)) or 1.0


def colours(values: Array, limit: float) -> Image:
    """Colours of signed values: orange above zero, blue below, near white at zero, magenta NaN.

    The strength of the colour follows the square root of the absolute value, so that a quarter
    of ``limit`` is drawn half as strong as ``limit``; beyond ``limit`` it no longer grows.

    Args:
        values: any shape.
        limit: the positive value that is drawn in full colour.

    Returns:
        ``[*values.shape, 3]`` in ``uint8``.
    """
    strength = np.sqrt(np.minimum(np.abs(np.nan_to_num(values)) / limit, 1.0))[..., None]
    ends = np.where((values > 0)[..., None], CULPRIT, HELPER)
    mixed = np.rint(np.asarray(NEUTRAL) * (1 - strength) + ends * strength).astype(np.uint8)
    return np.where(np.isnan(values)[..., None], np.asarray(NAN, dtype=np.uint8), mixed)


def row_height(rows: int) -> int:
    """Height of a row in pixels: room for its label, more where there are few rows."""
    return int(np.clip(360 // max(rows, 1), 15, 24))


def draw(history: History, title: str, max_units: int) -> Image:
    """Draws the units with the largest absolute blame over the steps.

    The size of the picture depends on ``min(history.units, max_units)`` alone.

    Args:
        history: at least one entry.
        title: name of the layer.
        max_units: most rows drawn.

    Returns:
        ``[height, IMAGE_WIDTH, 3]`` in ``uint8``.

    Raises:
        ImportError: if Pillow is not installed.
    """
    from PIL import Image as PillowImage

    matrix = history.matrix()
    shown = largest_units(matrix, max_units)
    cells = matrix[shown]
    limit, row = colour_limit(cells), row_height(len(shown))
    bottom = PLOT_TOP + row * len(shown)

    pixels = np.full((bottom + _BOTTOM, IMAGE_WIDTH, 3), 255, dtype=np.uint8)
    column_of_pixel = np.arange(PLOT_WIDTH) * cells.shape[1] // PLOT_WIDTH
    plot = colours(cells, limit)[:, column_of_pixel]
    pixels[PLOT_TOP:bottom, PLOT_LEFT : PLOT_LEFT + PLOT_WIDTH] = np.repeat(plot, row, axis=0)
    legend_top = bottom + 36
    ramp = np.linspace(-1, 1, _LEGEND_WIDTH)
    ramp = np.sign(ramp) * ramp**2 * limit
    pixels[legend_top : legend_top + _LEGEND_HEIGHT, PLOT_LEFT : PLOT_LEFT + _LEGEND_WIDTH] = (
        colours(ramp, limit)
    )

    picture = PillowImage.fromarray(pixels)
    pen = _Pen(picture)
    width = IMAGE_WIDTH - PLOT_LEFT
    pen.write(PLOT_LEFT, 8, f"{title}: blame per sample", width=width)
    pen.write(
        PLOT_LEFT,
        30,
        f"steps {history.steps[0]} to {history.last_step}, {len(shown)} of {history.units} units "
        "shown, largest |blame| on top",
        colour=_FAINT,
        width=width,
    )
    for place, unit in enumerate(shown):
        pen.write(PLOT_LEFT - 6, PLOT_TOP + row * place + row // 2, str(unit), anchor="rm")
    _write_steps(pen, history, bottom + 7)
    _write_legend(pen, cells, limit, legend_top)
    return np.asarray(picture)


def _write_steps(pen: _Pen, history: History, top: int) -> None:
    """Labels the first, a middle and the last column."""
    columns = len(history.steps)
    pen.write(PLOT_LEFT, top, f"step {history.steps[0]}")
    if columns > 2:
        middle = columns // 2
        x = PLOT_LEFT + PLOT_WIDTH * middle // columns
        pen.write(x, top, str(history.steps[middle]), anchor="mt")
    pen.write(PLOT_LEFT + PLOT_WIDTH, top, str(history.last_step), anchor="rt")


def _write_legend(pen: _Pen, cells: Array, limit: float, top: int) -> None:
    """Labels the ramp of colours and says what they mean."""
    below = top + _LEGEND_HEIGHT + 6
    for place, label in ((0.0, f"{-limit:.2g}"), (0.5, "0"), (1.0, f"+{limit:.2g}")):
        pen.write(PLOT_LEFT + round(place * _LEGEND_WIDTH), below, label, anchor="mt")
    largest = np.abs(cells[np.isfinite(cells)]).max(initial=0.0)
    right = PLOT_LEFT + _LEGEND_WIDTH + 36
    pen.write(right, top, "orange raises the loss, blue lowers it")
    pen.write(right, below, "magenta: NaN; square-root scale", colour=_FAINT)
    pen.write(right, 2 * below - top, f"largest cell ±{largest:.2g}", colour=_FAINT)


class _Pen:
    """Writes text that Pillow's own font can show."""

    def __init__(self, picture: PillowImage.Image) -> None:
        from PIL import ImageDraw, ImageFont, features

        self._canvas = ImageDraw.Draw(picture)
        # Without FreeType there is only a bitmap font of one size, which knows no anchors.
        self._anchors = features.check("freetype2")
        self._font = ImageFont.load_default(_FONT_SIZE if self._anchors else None)

    def write(
        self,
        x: int,
        y: int,
        text: str,
        anchor: str = "lt",
        colour: tuple[int, int, int] = _INK,
        width: int | None = None,
    ) -> None:
        # Neither of Pillow's two fonts goes beyond Latin-1.
        text = plain_text(text).encode("latin-1", "replace").decode("latin-1")
        while width is not None and self._font.getlength(text) > width:
            text = text[:-4] + "..."
        if not self._anchors:
            x -= {"l": 0, "m": 1, "r": 2}[anchor[0]] * int(self._font.getlength(text)) // 2
            y -= 5 if anchor[1] == "m" else 0
        self._canvas.text((x, y), text, fill=colour, font=self._font, anchor=anchor)
