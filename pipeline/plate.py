"""Labelled grids of small images on one dark plate: the look that all pictures of the project share.

Pixels are enlarged by whole numbers with the nearest neighbour, so a ball of one pixel stays a crisp square. Labels are
set large enough to be read when the plate is as wide as a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]

BACKGROUND = (22, 25, 32)
INK = (235, 237, 242)
MUTED = (154, 163, 178)
CELL_WIDTH = 168
GAP = 10
MARGIN = 24
LABEL_SIZE = 27
NOTE_SIZE = 22


@dataclass(frozen=True)
class Row:
    """One row of a plate.

    Attributes:
        label: Printed above the row, may be empty.
        cells: Each (h, w) uint8 grey or (h, w, 3) uint8 RGB, all of one size.
        note: A quieter remark on the label's line, at the right.
        captions: One short text under each cell, or none.
    """

    label: str
    cells: Sequence[Pixels]
    note: str = ""
    captions: Sequence[str] = ()


def compose(rows: Sequence[Row]) -> Image.Image:
    """Draw rows of cells under their labels.

    Args:
        rows: At least one; every cell of the plate has the same height and width.

    Returns:
        RGB image, about 1,100 pixels wide for six cells.
    """
    cell_height, cell_width = _cell_size(rows[0].cells[0])
    widest = max(len(row.cells) for row in rows)
    width = 2 * MARGIN + widest * (cell_width + GAP) - GAP
    height = 2 * MARGIN + sum(_row_height(row, cell_height) for row in rows) - GAP
    plate = Image.new("RGB", (width, height), BACKGROUND)
    top = MARGIN
    for row in rows:
        _draw_row(plate, row, top, cell_height, cell_width)
        top += _row_height(row, cell_height)
    return plate


def enlarge(pixels: Pixels, factor: int) -> Pixels:
    """Repeat every pixel of an (h, w[, 3]) image `factor` times along both axes."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def heat(values: NDArray[np.floating], top: float) -> Pixels:
    """Colour non-negative values from black (0) through magenta to pale yellow (`top`).

    Args:
        values: (h, w). Clipped to [0, top].
        top: The value shown brightest, greater than 0.

    Returns:
        (h, w, 3) uint8.
    """
    rgba = matplotlib.colormaps["magma"](np.clip(values / top, 0.0, 1.0), bytes=True)
    return np.asarray(rgba, dtype=np.uint8)[..., :3]


def heat_over(values: NDArray[np.floating], top: float, under: Pixels) -> Pixels:
    """The colours of `heat`, laid bright over a dimmed grey image (h, w): (h, w, 3) uint8."""
    dimmed = (0.4 * under[..., None]).astype(np.uint16)
    return np.minimum(heat(values, top) + dimmed, 255).astype(np.uint8)


@cache
def font(size: int, *, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, so that a plate looks the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def scale_for(width: int) -> int:
    """The whole number that brings a frame of `width` pixels nearest to the width of a cell."""
    return max(1, round(CELL_WIDTH / width))


def _cell_size(cell: Pixels) -> tuple[int, int]:
    scale = scale_for(cell.shape[1])
    return cell.shape[0] * scale, cell.shape[1] * scale


def _row_height(row: Row, cell_height: int) -> int:
    label = LABEL_SIZE + GAP + 4 if row.label or row.note else 0
    captions = NOTE_SIZE + GAP if row.captions else 0
    return label + cell_height + captions + 2 * GAP


def _draw_row(plate: Image.Image, row: Row, top: int, cell_height: int, cell_width: int) -> None:
    draw = ImageDraw.Draw(plate)
    if row.label or row.note:
        baseline = top + LABEL_SIZE
        draw.text((MARGIN, baseline), row.label, INK, font(LABEL_SIZE, is_bold=True), anchor="ls")
        draw.text((plate.width - MARGIN, baseline), row.note, MUTED, font(NOTE_SIZE), anchor="rs")
        top = baseline + GAP + 4
    for column, cell in enumerate(row.cells):
        left = MARGIN + column * (cell_width + GAP)
        plate.paste(Image.fromarray(enlarge(cell, scale_for(cell.shape[1]))), (left, top))
        if row.captions:
            centre = (left + cell_width // 2, top + cell_height + NOTE_SIZE + GAP // 2)
            draw.text(centre, row.captions[column], MUTED, font(NOTE_SIZE), anchor="ms")
