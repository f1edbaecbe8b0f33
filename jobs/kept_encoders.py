"""Where a run of Q-learning leaves encoders on its way, and frames to compare them on.

encoders/agent-steps-000020000/   the encoder as it was when Q-learning began, at a checkpoint, or at the end
encoders/early.png                frames held by the replay at the first of them, one above the other
encoders/late.png                 frames that had come last at the last of them
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import UserError
from pipeline.schema import Preprocess
from pipeline.untrusted import require_plain_entries

ENCODERS_FOLDER = "encoders"
EARLY_FILE, LATE_FILE = "early.png", "late.png"
MOST_KEPT = 12
_NAME = re.compile(r"agent-steps-(\d{9,})")
_MOST_PIXELS = 2**26

Frames = NDArray[np.uint8]


def kept_encoders(folder: Path) -> list[tuple[int, Path]]:
    """(agent steps, bundle) of the encoders in a run's folder, in order; none where it has none.

    Raises:
        UserError: Something there is a link.
    """
    place = folder / ENCODERS_FOLDER
    if not place.is_dir():
        return []
    if place.is_symlink():
        raise UserError(f"{place} is a link; do not trust its maker")
    require_plain_entries(place, f"the encoders in {place}")
    return sorted((int(match[1]), path) for path in place.iterdir() if (match := _NAME.fullmatch(path.name)))


def place_of(folder: Path, agent_steps: int) -> Path:
    """Where a run's folder keeps the encoder of so many agent steps."""
    return folder / ENCODERS_FOLDER / f"agent-steps-{agent_steps:09d}"


def evenly(agent_steps: Iterable[int], every: int, most: int = MOST_KEPT) -> list[int]:
    """The first, the last, and between them those of each, each second, each fourth ... multiple of `every`.

    How many are left out depends on the first and the last alone, so that it does not matter when that is done.

    Args:
        agent_steps: When encoders were kept, one at least.
        every: Agent steps between two checkpoints.
        most: Greatest number that stays, at least 3.
    """
    steps, stride = sorted(agent_steps), 1
    first, last = steps[0] // every, steps[-1] // every
    while last // stride - (first - 1) // stride + 2 > most:
        stride *= 2
    first_of = {step // every: step for step in reversed(steps)}
    between = {step for number, step in first_of.items() if number % stride == 0}
    return sorted(between | {steps[0], steps[-1]})


def leftovers(folder: Path) -> list[Path]:
    """What killed writers of a run's encoders have left in its folder."""
    place = folder / ENCODERS_FOLDER
    patterns = (".agent-steps-*", f".{EARLY_FILE}", f".{LATE_FILE}")
    return [] if place.is_symlink() else sorted(path for pattern in patterns for path in place.glob(pattern))


def compared_frames(folder: Path, preprocess: Preprocess) -> tuple[Frames, Frames]:
    """Early and late frames (N, H, W) of a run that has kept encoders.

    Raises:
        UserError: They are not there, or not of the run's size.
    """
    size = (preprocess.height, preprocess.width)
    early, late = (_read_frames(folder / ENCODERS_FOLDER / name, size) for name in (EARLY_FILE, LATE_FILE))
    return early, late


def _read_frames(path: Path, size: tuple[int, int]) -> Frames:
    with Image.open(path, formats=["PNG"]) as image:
        width, height = image.size
        if (image.mode, width) != ("L", size[1]) or height % size[0] or width * height > _MOST_PIXELS:
            raise UserError(f"{path} is no column of grey frames of {size[0]}x{size[1]}; restore it")
        return np.array(image).reshape(-1, *size)
