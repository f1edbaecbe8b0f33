"""Does a representation know how the ball moves? Ridge regression of its velocity on stacked features.

One frame says where the ball is, not where it goes: the single feature vector beside the stack should explain nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import atariari
from pipeline.errors import UserError
from pipeline.labels import TEST, TRAIN, VALIDATION, Labels

GAMES = ("pong", "breakout")
STACK = 4
MAX_JUMP = 16  # pixels an agent step, along either axis: the ball is faster only where it is served anew
PENALTIES = tuple(10.0**power for power in range(-6, 4))  # of the ridge, relative to the features' mean variance

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Velocity:
    """Share of the variance of the ball's dx and dy on test frames that is explained, R²."""

    stacked: dict[str, float]
    single: dict[str, float]
    num_frames: int


def velocity(features: Tensor, labels: Labels, stack: int = STACK) -> Velocity:
    """R² of the ball's velocity, in pixels an agent step, given features of `stack` consecutive frames and of the last.

    Counted are frames t whose window t - stack + 1 .. t lies in one episode, with the ball in play (its y is not 0)
    and no jump of more than MAX_JUMP. The target is the position at t less that at t - 1. Parts as for the probes.

    Args:
        features: (N, Z) float32, one row for each row of the dataset.
        labels: Of the same dataset.
        stack: Frames, at least 2.

    Raises:
        UserError: The game is none of GAMES, or too few frames are left.
    """
    if labels.game not in GAMES:
        raise UserError(f"the ball's velocity is measured on {' and '.join(GAMES)}, not on {labels.game}")
    if stack < 2:
        raise UserError(f"{stack} frames have no velocity; stack at least 2")
    ends, target = moving(labels, stack)
    parts = [np.flatnonzero(labels.split[ends] == part) for part in (TRAIN, VALIDATION, TEST)]
    if min(map(len, parts)) < 2:
        raise UserError(f"the ball moves in too few frames ({[len(part) for part in parts]}); collect more frames")
    figures = []
    for frames in (stack, 1):
        rows = ends[:, None] - np.arange(frames)[::-1]
        figures.append(_r2(features[torch.from_numpy(rows)].flatten(1), torch.from_numpy(target), parts))
    return Velocity(figures[0], figures[1], len(ends))


def moving(labels: Labels, stack: int) -> tuple[Ints, NDArray[np.float32]]:
    """Rows (M,) at which a window with the ball in play ends, and its velocity (M, 2) there."""
    places = atariari.variables(labels.game)
    ball_N2 = labels.ram[:, [places["ball_x"], places["ball_y"]]].astype(np.int64)
    is_in_play = (ball_N2[:, 1] > 0) & (labels.split >= 0)
    step = np.diff(ball_N2, axis=0)
    is_smooth = (np.abs(step) <= MAX_JUMP).all(1) & (np.diff(labels.episode) == 0) & is_in_play[1:] & is_in_play[:-1]
    runs = np.lib.stride_tricks.sliding_window_view(is_smooth, stack - 1).all(1)
    ends = np.flatnonzero(runs) + stack - 1
    return ends, step[ends - 1].astype(np.float32)


def _r2(x: Tensor, target: Tensor, parts: list[Ints]) -> dict[str, float]:
    """The penalty that explains most of the validation part, by what it explains of the test part."""
    train, validation, test = (torch.from_numpy(part) for part in parts)
    mean_x, mean_y = x[train].mean(0), target[train].mean(0)
    centred = (x[train] - mean_x).double()
    gram, moment = centred.T @ centred, centred.T @ (target[train] - mean_y).double()
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.T @ moment
    best: dict[str, tuple[float, float]] = {}
    for penalty in PENALTIES:
        ridge = penalty * values.mean().clamp(min=torch.finfo(torch.float64).tiny)
        weights = vectors @ (turned / (values.clamp(min=0) + ridge)[:, None])
        seen, new = (_explained((x[p] - mean_x).double() @ weights + mean_y, target[p]) for p in (validation, test))
        for axis, name in enumerate(("dx", "dy")):
            best[name] = max(best.get(name, (-float("inf"), 0.0)), (seen[axis], new[axis]))
    return {name: pair[1] for name, pair in best.items()}


def _explained(predicted: Tensor, target: Tensor) -> list[float]:
    rest = (target - predicted).square().sum(0)
    explained: list[float] = (1 - rest / (target - target.mean(0)).square().sum(0).clamp(min=1e-12)).tolist()
    return explained
