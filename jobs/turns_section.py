"""The part of an encoder's page that has sliders: latents, directions, the way between two frames."""

from __future__ import annotations

from pathlib import Path

from pipeline.pictures import SIGMA, BlendFigure, Figures, ViewFigure
from pipeline.report import Picture, Strip, Turn, TurnGroup
from pipeline.views import SIGMAS

LATENTS = (
    "The {count} latents of greatest KL. Each is moved through the range that it takes on {source}; all others stay. "
    "In the middle where the picture changes; at the right what the latent looks at: how far its posterior mean moves "
    "when a pixel does what it does in the game (mean absolute gradient times the pixel's standard deviation)."
)
CHANNELS = (
    "z is a grid: a latent is one channel in one cell. These are the {count} channels of greatest KL. Each is moved in "
    "the one cell in which it carries most, through the range that it takes there on {source}; all others stay. In the "
    "middle where the picture changes; at the right what each cell of the channel carries, its KL."
)
DIRECTIONS = (
    "The directions in which the latents vary most, the principal components of their means. Where a code is spread "
    "over many latents, one of them shows little, and a direction more. At the right what the posterior mean along it "
    "looks at: mean absolute gradient times the pixel's standard deviation."
)
BETWEEN = (
    "On the straight line between two latents the decoder shows possible frames where it has learned the game's "
    "geometry; on the line between the pixels one frame only fades into the other."
)


def turn_groups(folder: Path, figures: Figures) -> list[TurnGroup]:
    """All that can be turned of what lies in a folder of figures."""
    one, lead = ("channel", CHANNELS) if figures.is_grid else ("latent", LATENTS)
    lead = lead.format(count=len(figures.latents), source=figures.source)
    return [
        TurnGroup(f"Turn a {one}", lead, [_view(folder, view) for view in figures.latents]),
        TurnGroup("Turn many at once", DIRECTIONS, [_view(folder, view) for view in figures.directions]),
        TurnGroup(
            "Between two frames",
            BETWEEN,
            [_blend(folder, blend, f"pair {number + 1}") for number, blend in enumerate(figures.blends)],
        ),
    ]


def _view(folder: Path, view: ViewFigure) -> Turn:
    texts = [f"{sigma:+g}{SIGMA}: {value:.2f}" for sigma, value in zip(SIGMAS, view.values)]
    texts[len(texts) // 2] = f"mean: {view.values[len(texts) // 2]:.2f}"
    stills = [Picture(folder / view.change, "changes", ""), Picture(folder / view.looks, "looks at", "")]
    strip = Strip(folder / view.strip, len(view.values), "decoder mean")
    return Turn(view.name, view.note, texts, [strip], stills, start=len(texts) // 2)


def _blend(folder: Path, blend: BlendFigure, name: str) -> Turn:
    texts = [f"{step / (blend.num_steps - 1):.0%}" for step in range(blend.num_steps)]
    strips = [
        Strip(folder / blend.latents, blend.num_steps, "through the latent space"),
        Strip(folder / blend.pixels, blend.num_steps, "through the pixels"),
    ]
    return Turn(name, "", texts, strips, start=blend.num_steps // 2)
