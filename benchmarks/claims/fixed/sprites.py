"""A world of three sprites of two kinds, and a checker that counts them.

Two walkers, one on each of two floors, and a ball that flies anywhere, in front of them: four numbers say all. A frame
is 64 x 64 pixels uint8: ground 0, walkers 128, ball 255. The ball is smaller than a walker and can hide a part of it.

Shapes: N frames, H and W 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
GROUND, WALKER_LEVEL, BALL_LEVEL = 0, 128, 255
WALKER_ROWS = (14, 44)  # the top row of each floor's walker
_WALKER_ART = (
    "...###...",
    "..#####..",
    "..#####..",
    "...###...",
    ".#######.",
    "#########",
    "#########",
    ".#######.",
    ".#######.",
    "..#####..",
    "..#####..",
    ".###.###.",
    ".###.###.",
)
_BALL_ART = (
    "..###..",
    ".#####.",
    "#######",
    "#######",
    "#######",
    ".#####.",
    "..###..",
)
WALKER = np.array([[mark == "#" for mark in row] for row in _WALKER_ART])
BALL = np.array([[mark == "#" for mark in row] for row in _BALL_ART])
WALKER_PLACES = SIDE - WALKER.shape[1] + 1  # left columns that a walker can have
BALL_PLACES = SIDE - BALL.shape[0] + 1  # top rows, and left columns, that the ball can have

# How far a smooth drawing may be from the sharp one: by how many levels a pixel may be off that is not next to an
# outline, how many such pixels may be, and what share of a sprite's visible pixels must be right for it to be counted.
TOLERANCE_LEVELS = 60
STRAY_PIXELS_MOST = 4
AGREEING_LEAST = 0.8
_BALL_CANDIDATES = 6
_BATCH = 64


@dataclass(frozen=True)
class Scenes:
    """Where the sprites are, N scenes.

    Attributes:
        walkers: (N, 2) int64, left column of each floor's walker.
        ball: (N, 2) int64, top row and left column of the ball.
    """

    walkers: np.ndarray
    ball: np.ndarray

    def __getitem__(self, index: slice | np.ndarray) -> Scenes:
        return Scenes(self.walkers[index], self.ball[index])

    def __len__(self) -> int:
        return len(self.ball)


@dataclass(frozen=True)
class Verdict:
    """What the checker found in N images.

    Attributes:
        num_sprites: (N,) int64, how many of the three sprites of the best-fitting scene are there.
        num_stray: (N,) int64, pixels that the scene does not explain.
    """

    num_sprites: np.ndarray
    num_stray: np.ndarray

    @property
    def is_valid(self) -> np.ndarray:
        """(N,) bool: three sprites and nothing else."""
        return (self.num_sprites == 3) & (self.num_stray <= STRAY_PIXELS_MOST)


def draw_scenes(count: int, seed: int) -> Scenes:
    """Scenes drawn uniformly over all places, each sprite by itself."""
    rng = np.random.default_rng(seed)
    return Scenes(rng.integers(0, WALKER_PLACES, (count, 2)), rng.integers(0, BALL_PLACES, (count, 2)))


def render(scenes: Scenes) -> np.ndarray:
    """Frames (N, 64, 64) uint8."""
    return _compose(*_masks(scenes)).numpy()


def check(images: np.ndarray) -> Verdict:
    """Counts the sprites of images (N, 64, 64), levels of any dtype.

    The scene that explains an image best is sought among all that the renderer can draw; it is a scene's drawing that
    the image is then held to, pixel by pixel. Pixels within one of an outline may be anything, since decoders are
    smooth; all others must be within TOLERANCE_LEVELS. A sprite is there if AGREEING_LEAST of its visible pixels that
    are not next to an outline are right. So a blank image, a ghost at half its brightness, a smear, a missing sprite
    and a fourth one are all refused.
    """
    levels = torch.from_numpy(np.array(images, np.float32))
    found = [_check(batch) for batch in torch.split(levels, _BATCH)]
    return Verdict(*(np.concatenate([getattr(one, name) for one in found]) for name in ("num_sprites", "num_stray")))


def _masks(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Pixels of the walkers (N, 2, H, W) and of the ball (N, H, W), bool, hidden ones too."""
    count = len(scenes)
    walkers = np.zeros((count, 2, SIDE, SIDE), bool)
    ball = np.zeros((count, SIDE, SIDE), bool)
    for index in range(count):
        for floor, top in enumerate(WALKER_ROWS):
            left = scenes.walkers[index, floor]
            walkers[index, floor, top : top + WALKER.shape[0], left : left + WALKER.shape[1]] = WALKER
        top, left = scenes.ball[index]
        ball[index, top : top + BALL.shape[0], left : left + BALL.shape[1]] = BALL
    return torch.from_numpy(walkers), torch.from_numpy(ball)


def _compose(walkers: Tensor, ball: Tensor) -> Tensor:
    levels = torch.full(ball.shape, GROUND, dtype=torch.uint8)
    levels[walkers.any(1)] = WALKER_LEVEL
    levels[ball] = BALL_LEVEL
    return levels


def _check(images: Tensor) -> Verdict:
    """The best of a few scenes for each image: the most sprites, then the fewest stray pixels."""
    best_sprites = torch.full((len(images),), -1)
    best_stray = torch.full((len(images),), SIDE * SIDE)
    for ball in _ball_candidates(images):
        sprites, stray = _held_to(images, _scene_with(images, ball))
        is_better = (sprites > best_sprites) | ((sprites == best_sprites) & (stray < best_stray))
        best_sprites = torch.where(is_better, sprites, best_sprites)
        best_stray = torch.where(is_better, stray, best_stray)
    return Verdict(best_sprites.numpy(), best_stray.numpy())


def _ball_candidates(images: Tensor) -> list[np.ndarray]:
    """The places (N, 2) of the ball at which the image is nearest to a ball, the nearest first."""
    template = torch.from_numpy(BALL).float()
    ring = F.max_pool2d(F.pad(template, (1, 1, 1, 1))[None], 3, 1, 1)[0] - F.pad(template, (1, 1, 1, 1))
    inside = _squared_error(images, template, BALL_LEVEL)
    padded = F.pad(images, (1, 1, 1, 1))
    # Around a ball there is ground or a walker, never a ball.
    outside = F.conv2d((padded - WALKER_LEVEL).clamp(min=0).square()[:, None], ring[None, None])[:, 0]
    order = (inside + outside).flatten(1).argsort(1)[:, :_BALL_CANDIDATES].numpy()
    return [np.stack(np.divmod(order[:, rank], BALL_PLACES), 1) for rank in range(_BALL_CANDIDATES)]


def _squared_error(images: Tensor, template: Tensor, level: int, weights: Tensor | None = None) -> Tensor:
    """Sum over the template's pixels of the squared difference to `level`, at every place."""
    error = (images - level).square()
    error = error if weights is None else error * weights
    return F.conv2d(error[:, None], template[None, None])[:, 0]


def _scene_with(images: Tensor, ball: np.ndarray) -> Scenes:
    """The scenes with the ball there whose walkers stand where the rest of their floor is nearest to a walker."""
    nowhere = np.zeros((len(images), 2), np.int64)
    is_seen = ~_masks(Scenes(nowhere, ball))[1]
    template = torch.from_numpy(WALKER).float()
    walkers = []
    for top in WALKER_ROWS:
        rows = slice(top, top + WALKER.shape[0])
        strip, seen = images[:, rows], is_seen[:, rows].float()
        as_walker = _squared_error(strip, template, WALKER_LEVEL, seen)[:, 0]
        as_ground = _squared_error(strip, template, GROUND, seen)[:, 0]
        walkers.append((as_walker - as_ground).argmin(1))
    return Scenes(torch.stack(walkers, 1).numpy(), ball)


def _held_to(images: Tensor, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Sprites (N,) of these scenes that the images (N, H, W) show, and stray pixels (N,)."""
    walkers, ball = _masks(scenes)
    drawn = _compose(walkers, ball).float()
    is_firm = ~_next_to_outline(drawn)
    is_right = (images - drawn).abs() <= TOLERANCE_LEVELS
    seen = torch.cat([walkers & ~ball[:, None], ball[:, None]], 1) & is_firm[:, None]
    agreeing = (seen & is_right[:, None]).sum((2, 3)) / seen.sum((2, 3)).clamp(min=1)
    sprites = ((agreeing >= AGREEING_LEAST) & (seen.sum((2, 3)) > 0)).sum(1)
    return sprites, (is_firm & ~is_right).sum((1, 2))


def _next_to_outline(drawn: Tensor) -> Tensor:
    """(N, H, W) bool: pixels one of whose eight neighbours has another level."""
    highest = F.max_pool2d(drawn[:, None], 3, 1, 1)[:, 0]
    lowest = -F.max_pool2d(-drawn[:, None], 3, 1, 1)[:, 0]
    return highest != lowest
