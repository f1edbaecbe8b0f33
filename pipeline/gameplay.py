"""Animated pictures of an agent at play: the coloured game, what the encoder sees, and what its latent keeps of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.plate import BACKGROUND, INK, Pixels, font

FRAME_DURATION_MS = 70  # an agent step lasts 4/60 s; GIF counts in hundredths of a second
MAX_BYTES = 3_000_000
NUM_GREYS = 64
PANEL_SIZE = (420, 320)  # height, width in pixels: the screen of the game, twice as large
MARGIN = 16
LABEL_SIZE = 28
LABEL_HEIGHT = 40
INK_SHADES = 8


@dataclass(frozen=True)
class Moment:
    """One agent step on film.

    Attributes:
        screen: (210, 160, 3) uint8, the coloured game.
        frame: (H, W) uint8, the grey frame that the encoder gets.
        reconstruction: (H, W) uint8, the decoder's mean for the latent of that frame; None without a decoder.
    """

    screen: Pixels
    frame: Pixels
    reconstruction: Pixels | None


def write_gameplay(moments: Sequence[Moment], path: Path, *, max_bytes: int = MAX_BYTES) -> int:
    """Writes an endless animated GIF in real time, with the exact colours of the game.

    A GIF has 256 colours: the game's own (ALE knows 128) and NUM_GREYS greys suffice, so nothing is dithered.

    Args:
        moments: At least one, in order.
        path: The .gif to write.
        max_bytes: The film is cut at its end until it fits.

    Returns:
        How many moments the file holds.

    Raises:
        ValueError: No moments, or not even one fits into `max_bytes`.
    """
    pictures = _draw_all(moments)
    count = len(pictures)
    while count > 0:
        data = _encode(pictures[:count])
        if len(data) <= max_bytes:
            path.write_bytes(data)
            return count
        count = min(count - 1, int(0.97 * count * max_bytes / len(data)))
    raise ValueError(f"a film of {len(pictures)} moments has none that fits into {max_bytes} bytes")


def poster(gif: Path) -> bytes:
    """The first picture of a film as a PNG, for people who asked for no motion."""
    buffer = io.BytesIO()
    with Image.open(gif) as film:
        film.convert("RGB").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _encode(pictures: Sequence[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    first, rest = pictures[0], pictures[1:]
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=FRAME_DURATION_MS, loop=0, disposal=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Stage:
    """Where the panels of a film stand, and the still picture around them.

    Attributes:
        backdrop: (h, w, 3) uint8, background and labels.
        corners: (top, left) of each panel.
    """

    backdrop: Pixels
    corners: list[tuple[int, int]]


class _Palette:
    """The colours of a film: those of its backdrop and screens, exactly, then NUM_GREYS greys."""

    def __init__(self, pictures: Sequence[Pixels]) -> None:
        self._codes = np.unique(np.concatenate([np.unique(_codes(picture)) for picture in pictures]))
        if len(self._codes) + NUM_GREYS > 256:
            raise ValueError(f"{len(self._codes)} colours and {NUM_GREYS} greys do not fit into a GIF's 256")

    def flat(self) -> list[int]:
        """Red, green, blue, red, ... of all colours, in the order of their indices."""
        greys = np.linspace(0, 255, NUM_GREYS).round().astype(int)
        parts = np.stack([self._codes >> 16, (self._codes >> 8) & 255, self._codes & 255], axis=1)
        return [*parts.reshape(-1).tolist(), *np.repeat(greys, 3).tolist()]

    def index(self, panel: Pixels) -> Pixels:
        """Indices (h, w) uint8 of an RGB panel (h, w, 3), exactly, or of a grey one (h, w), to the nearest grey."""
        if panel.ndim == 3:
            return np.searchsorted(self._codes, _codes(panel)).astype(np.uint8)
        nearest = np.rint(panel.astype(np.float32) * (NUM_GREYS - 1) / 255)
        return (len(self._codes) + nearest).astype(np.uint8)


def _codes(colours: Pixels) -> NDArray[np.int32]:
    """(..., 3) uint8 -> (...) int32, one number a colour."""
    parts = colours.astype(np.int32)
    codes: NDArray[np.int32] = (parts[..., 0] << 16) | (parts[..., 1] << 8) | parts[..., 2]
    return codes


def _draw_all(moments: Sequence[Moment]) -> list[Image.Image]:
    if not moments:
        raise ValueError("a film needs at least one moment")
    stage = _stage(_panels(moments[0]))
    palette = _Palette([stage.backdrop, *(moment.screen for moment in moments)])
    return [_draw(moment, stage, palette) for moment in moments]


def _panels(moment: Moment) -> dict[str, Pixels]:
    """Label: picture, in its own resolution, from left to right."""
    panels = {"the game": moment.screen, "the encoder sees": moment.frame}
    if moment.reconstruction is not None:
        panels["its latent keeps"] = moment.reconstruction
    return panels


def _factors(panel: Pixels) -> tuple[int, int]:
    """Whole numbers, down and across, that bring a panel to about PANEL_SIZE: a square frame fills it too."""
    return max(1, round(PANEL_SIZE[0] / panel.shape[0])), max(1, round(PANEL_SIZE[1] / panel.shape[1]))


def _enlarged(panel: Pixels) -> Pixels:
    down, across = _factors(panel)
    return panel.repeat(down, axis=0).repeat(across, axis=1)


def _stage(panels: dict[str, Pixels]) -> _Stage:
    sizes = [_enlarged(panel).shape[:2] for panel in panels.values()]
    tallest = max(height for height, _ in sizes)
    width = MARGIN + sum(width + MARGIN for _, width in sizes)
    shade = Image.new("L", (width, MARGIN + LABEL_HEIGHT + tallest + MARGIN))
    pen, corners, left = ImageDraw.Draw(shade), [], MARGIN
    for label, (height, panel_width) in zip(panels, sizes, strict=True):
        pen.text((left + panel_width // 2, MARGIN + LABEL_SIZE), label, 255, font(LABEL_SIZE), anchor="ms")
        corners.append((MARGIN + LABEL_HEIGHT + (tallest - height) // 2, left))
        left += panel_width + MARGIN
    return _Stage(_tint(np.asarray(shade)), corners)


def _tint(shade: Pixels) -> Pixels:
    """(h, w) uint8, 0 background to 255 ink -> (h, w, 3) uint8, in INK_SHADES steps to spare the palette."""
    steps = np.rint(shade / 255 * (INK_SHADES - 1))[..., None] / (INK_SHADES - 1)
    return np.rint((1 - steps) * np.array(BACKGROUND) + steps * np.array(INK)).astype(np.uint8)


def _draw(moment: Moment, stage: _Stage, palette: _Palette) -> Image.Image:
    canvas = palette.index(stage.backdrop)
    for panel, (top, left) in zip(_panels(moment).values(), stage.corners, strict=True):
        cells = _enlarged(palette.index(panel))
        canvas[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
    picture = Image.fromarray(canvas)
    picture.putpalette(palette.flat())
    return picture
