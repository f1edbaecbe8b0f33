"""Figures of what an encoder has learned, as files in a folder: pictures for MLflow, and strips for the page's sliders.

reconstructions.png  traversals.png  directions.png  looks.png  interpolation.png  samples.png
figures.json         what `Figures` holds, for the page
strips/              the same decoder means as in the pictures, finer, side by side, grey
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.disk import write_text
from pipeline.models.distributions import DiagonalGaussian
from pipeline.models.latent import LatentModel
from pipeline.plate import (
    BACKGROUND,
    GAP,
    INK,
    LABEL_SIZE,
    MARGIN,
    MUTED,
    NOTE_SIZE,
    Pixels,
    Row,
    compose,
    font,
    heat,
    heat_over,
)
from pipeline.untrusted import from_record, read_json, require_inside, require_plain_entries
from pipeline.views import (
    SIGMAS,
    Blend,
    Unit,
    View,
    as_pixels,
    blends,
    decoded,
    direction_views,
    latent_views,
    posterior_of,
    samples,
)

FIGURES_FILE = "figures.json"
STRIPS_FOLDER = "strips"
PICTURES = ("reconstructions", "traversals", "directions", "looks", "interpolation", "samples")
COLUMNS = 6
NUM_TRAVERSED = 6
SAMPLE_ROWS = 3
MIN_CONTRAST_LEVELS = 8.0
BARS_SIZE = (1008, 300)  # of units.png, within its margins
ACTIVE, INACTIVE = (138, 162, 255), (90, 96, 110)
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"


@dataclass(frozen=True)
class ViewFigure:
    """A `View` on the page. `strip`, a picture for each of `values`, `change` and `looks` are files."""

    name: str
    note: str
    values: tuple[float, ...]
    strip: str
    change: str
    looks: str


@dataclass(frozen=True)
class BlendFigure:
    """A way between two frames on the page: two strips of `num_steps` pictures."""

    num_steps: int
    latents: str
    pixels: str


@dataclass(frozen=True)
class Figures:
    """What the strips of a folder show.

    Attributes:
        source: What the frames are, in words.
        height, width: Of a frame.
        is_grid: Whether latents are channels of a grid.
        latents: Units of greatest KL on these frames, the greatest first.
        directions: In which posterior means vary most.
        blends: Ways between two frames.
    """

    source: str
    height: int
    width: int
    is_grid: bool
    latents: tuple[ViewFigure, ...]
    directions: tuple[ViewFigure, ...]
    blends: tuple[BlendFigure, ...]

    @classmethod
    def read(cls, folder: Path) -> Figures | None:
        """The figures that lie in a folder; None where there are none.

        Raises:
            UserError: Their record is damaged.
        """
        path = folder / FIGURES_FILE
        if not path.is_file():
            return None
        for inside in (folder, folder / STRIPS_FOLDER):
            if inside.is_dir():
                require_plain_entries(inside, f"the figures in {inside}")
        figures = from_record(cls, read_json(path, str(path)), str(path))
        views = (*figures.latents, *figures.directions)
        names = [name for view in views for name in (view.strip, view.change, view.looks)]
        for name in (*names, *(name for blend in figures.blends for name in (blend.latents, blend.pixels))):
            require_inside(name, str(path))
        return figures


def encoder_pictures(model: LatentModel, frames: Pixels, out: Path, source: str = "") -> list[Path]:
    """Draws what a person judges an encoder by.

    Args:
        model: On the CPU, trained; its training flag is as before afterwards.
        frames: (N, H, W) uint8, at least 2, better some hundreds that were held out of training.
        out: Folder for the files; made when missing.
        source: What the frames are, in words.

    Returns:
        The pictures, in the order of PICTURES; strips and figures.json lie beside them.

    Raises:
        ValueError: Fewer than two frames, or not (N, H, W) uint8.
    """
    if frames.ndim != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(f"encoder_pictures needs at least 2 frames (N, H, W) uint8: got {frames.shape} {frames.dtype}")
    was_training = model.training
    model.eval()
    posterior = posterior_of(model, frames)
    latents, directions = (make(model, frames, posterior) for make in (latent_views, direction_views))
    ways = blends(model, frames, posterior)
    under = as_pixels(frames.mean(0, dtype=np.float32))
    plates = {
        "reconstructions": _reconstructions(model, frames, posterior),
        "traversals": [_traversal(view) for view in latents[:NUM_TRAVERSED]],
        "directions": [_traversal(view) for view in directions],
        "looks": _looks(latents, under),
        "interpolation": [row for way in ways for row in _blend(way)],
        "samples": _samples(model),
    }
    is_grid = len(model.config.latent_shape) > 1
    model.train(was_training)
    (out / STRIPS_FOLDER).mkdir(parents=True, exist_ok=True)
    drawn_latents, drawn_directions = (
        tuple(_view_figure(view, under, out, f"{kind}-{number:02d}") for number, view in enumerate(views))
        for kind, views in (("latent", latents), ("direction", directions))
    )
    between = tuple(_blend_figure(way, out, number) for number, way in enumerate(ways))
    height, width = frames.shape[1:]
    figures = Figures(source, height, width, is_grid, drawn_latents, drawn_directions, between)
    write_text(out / FIGURES_FILE, json.dumps(asdict(figures), indent=1) + "\n")
    return [_save(plates[name], out / f"{name}.png") for name in PICTURES]


def units_picture(found: Sequence[Unit], out: Path) -> Path:
    """Draws units.png: the KL of every unit as a bar, the greatest first, bright where it is active."""
    width, height = BARS_SIZE
    plate = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN + LABEL_SIZE + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(plate)
    num_active = sum(unit.num_active for unit in found)
    draw.text((MARGIN, MARGIN + LABEL_SIZE), "KL of every unit", INK, font(LABEL_SIZE, is_bold=True), anchor="ls")
    num_latents, nats = sum(unit.num_latents for unit in found), sum(unit.kl for unit in found)
    note = f"{num_active} of {num_latents} latents active, {nats:.0f} nats"
    draw.text((plate.width - MARGIN, MARGIN + LABEL_SIZE), note, MUTED, font(NOTE_SIZE), anchor="rs")
    top, base = max(1e-9, *(unit.kl for unit in found)), plate.height - MARGIN
    for index, unit in enumerate(sorted(found, key=lambda unit: -unit.kl)):
        left, right = (MARGIN + width * number / len(found) for number in (index, index + 1))
        box = (left, base - max(2, height * unit.kl / top), max(left, right - width / len(found) * 0.2), base)
        draw.rectangle(box, fill=ACTIVE if unit.num_active else INACTIVE)
    path = out / "units.png"
    plate.save(path)
    return path


def _save(rows: list[Row], path: Path) -> Path:
    compose(rows).save(path)
    return path


def _view_figure(view: View, under: Pixels, out: Path, name: str) -> ViewFigure:
    strip = _strip(view.strip, out, name)
    change = _strip(heat(view.change, _contrast(view.change))[None], out, f"{name}-change")
    return ViewFigure(
        view.name, view.note, view.values, strip, change, _strip(looking(view, under)[None], out, f"{name}-looks")
    )


def _blend_figure(way: Blend, out: Path, number: int) -> BlendFigure:
    latents, pixels = _strip(way.latents, out, f"blend-{number}"), _strip(way.pixels, out, f"fade-{number}")
    return BlendFigure(len(way.latents), latents, pixels)


def _strip(pictures: Pixels, out: Path, name: str) -> str:
    """Saves (V, H, W) or (V, H, W, 3) side by side; the name of the file."""
    file = f"{STRIPS_FOLDER}/{name}.png"
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(out / file)
    return file


def looking(view: View, under: Pixels) -> Pixels:
    """What a unit looks at, bright over the dimmed mean frame: (H, W, 3) uint8."""
    top = float(np.quantile(view.looks, 0.998))
    return heat_over(view.looks, max(top, float(view.looks.max()) / 4, 1e-12), under)


def _reconstructions(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian) -> list[Row]:
    chosen = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
    mean, std = decoded(model, posterior.mean[chosen])
    error = np.abs(frames[chosen].astype(np.float32) - mean)
    std_top, error_top, is_one = _contrast(std), _contrast(error), float(np.ptp(std)) < 1e-3
    spread = f"; std {std.mean():.1f} levels everywhere" if is_one else ""
    doubt = Row(
        "Decoder std", [heat(cell, std_top) for cell in std], note=f"black 0, bright {std_top:.0f} levels or more"
    )
    return [
        Row("Frame", list(frames[chosen])),
        Row("Decoder mean", list(as_pixels(mean)), note=f"the frame, seen through its latent{spread}"),
        *([] if is_one else [doubt]),
        Row("Error", [heat(cell, error_top) for cell in error], note=f"black 0, bright {error_top:.0f} levels or more"),
    ]


def _contrast(values: NDArray[np.float32]) -> float:
    """The value to show brightest: the 99.5th percentile, so that one bright pixel does not darken the rest."""
    return max(MIN_CONTRAST_LEVELS, float(np.quantile(values, 0.995)))


def _traversal(view: View) -> Row:
    captions = [f"{sigmas:+.0f}{SIGMA}" if sigmas else "mean" for sigmas in SIGMAS[::2]]
    cells = [_grey_to_rgb(cell) for cell in view.strip[::2]] + [heat(view.change, _contrast(view.change))]
    return Row(view.name, cells, note=view.note, captions=[*captions, "change"])


def _looks(views: list[View], under: Pixels) -> list[Row]:
    cells, captions = [looking(view, under) for view in views], [view.name for view in views]
    first = Row("What each looks at", cells[:COLUMNS], note="the brighter, the more", captions=captions[:COLUMNS])
    rest = Row("", cells[COLUMNS:], captions=captions[COLUMNS:])
    return [first, *([rest] if rest.cells else [])]


def _grey_to_rgb(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, axis=-1)


def _blend(way: Blend) -> list[Row]:
    return [
        Row("Through the latent space", list(way.latents[::2]), note="decoder mean"),
        Row("Through the pixels", list(way.pixels[::2]), note="the two frames cross-fade"),
    ]


def _samples(model: LatentModel) -> list[Row]:
    cells = list(samples(model, SAMPLE_ROWS * COLUMNS))
    rows = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    labels = ["Drawn from the prior"] + [""] * (SAMPLE_ROWS - 1)
    notes = ["decoder mean"] + [""] * (SAMPLE_ROWS - 1)
    return [Row(label, row, note=note) for label, row, note in zip(labels, rows, notes, strict=True)]
