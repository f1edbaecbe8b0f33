"""Two-dimensional shapes: one shape a frame, every combination of five factors, and a checker for "exactly one shape".

In the manner of dSprites (Matthey et al. 2017), drawn anew: an isosceles triangle, an ellipse or a heart; 6 sizes; 16
turns from -45 to 45 degrees, within which no shape looks like itself turned; 16 x 16 places, 2 pixels apart. A frame is
64 x 64 pixels uint8, ground 0, shape 255, its outline smoothed over one pixel.

Shapes: N frames, K factors (5), H and W 64.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

SIDE = 64
KINDS = ("triangle", "ellipse", "heart")
FACTORS = ("shape", "size", "turn", "x", "y")
SIZES = (3, 6, 16, 16, 16)  # how many values each factor has
RADII = np.linspace(7.0, 13.0, SIZES[1])  # pixels, of the circle around a shape
TURNS = np.deg2rad(np.linspace(-45.0, 45.0, SIZES[2]))
PLACES = 17.0 + 2.0 * np.arange(SIZES[3])  # pixels, the centre's column, and row
INSIDE = 127.5

# A midpoint shows exactly one shape if, cut at a threshold below that of half-bright ghosts, it is one patch, bright
# in its middle, whose outline is that of some shape of this world about its own centre.
THRESHOLD = 0.35 * 255
BRIGHT_LEAST = 0.6 * 255  # mean level of the patch, its outermost pixels left out
IOU_LEAST = 0.75
_SUBPIXELS = 4


def num_frames() -> int:
    """How many there are in all."""
    return int(np.prod(SIZES))


def factors_of(index: np.ndarray) -> np.ndarray:
    """Values (N, 5) int64 of the factors of frames by number; the last factor runs fastest."""
    return np.stack(np.unravel_index(index, SIZES), 1)


def index_of(factors: np.ndarray) -> np.ndarray:
    """Numbers (N,) of the frames with these factors (N, 5)."""
    return np.asarray(np.ravel_multi_index(tuple(factors.T), SIZES))


@functools.lru_cache(maxsize=1)
def all_frames() -> np.ndarray:
    """(73728, 64, 64) uint8, in the order of `factors_of`; 302 MB."""
    frames = np.zeros((*SIZES, SIDE, SIDE), np.uint8)
    for kind in range(SIZES[0]):
        for size in range(SIZES[1]):
            for turn in range(SIZES[2]):
                stamp = _stamp(kind, size, turn)
                half = stamp.shape[0] // 2
                for x, column in enumerate(PLACES.astype(int)):
                    for y, row in enumerate(PLACES.astype(int)):
                        frames[kind, size, turn, x, y, row - half : row + half, column - half : column + half] = stamp
    frames.flags.writeable = False
    return frames.reshape(-1, SIDE, SIDE)


def render(factors: np.ndarray) -> np.ndarray:
    """Frames (N, 64, 64) uint8 of factors (N, 5)."""
    frames = np.zeros((len(factors), SIDE, SIDE), np.uint8)
    for frame, (kind, size, turn, x, y) in zip(frames, factors):
        stamp = _stamp(int(kind), int(size), int(turn))
        half, row, column = stamp.shape[0] // 2, int(PLACES[y]), int(PLACES[x])
        frame[row - half : row + half, column - half : column + half] = stamp
    return frames


@functools.cache
def _stamp(kind: int, size: int, turn: int) -> np.ndarray:
    """A shape alone, (2 h, 2 h) uint8, about its centre."""
    half = int(np.ceil(RADII[size])) + 1
    fine = (np.arange(2 * half * _SUBPIXELS) + 0.5) / _SUBPIXELS - half
    right, down = np.meshgrid(fine, fine)
    cos, sin = np.cos(TURNS[turn]), np.sin(TURNS[turn])
    u, v = (cos * right + sin * down) / RADII[size], (-sin * right + cos * down) / RADII[size]
    is_inside = (_triangle, _ellipse, _heart)[kind](u, v)
    cells = is_inside.reshape(2 * half, _SUBPIXELS, 2 * half, _SUBPIXELS)
    return np.round(cells.mean((1, 3)) * 255).astype(np.uint8)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Its tip up, its corners on the unit circle."""
    return (v <= 0.75) & (np.abs(u) <= 0.66 * (v + 1) / 1.75)


def _ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u**2 / 0.5**2 + v**2 <= 1


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two discs over a triangle."""
    lobes = (np.abs(u) - 0.42) ** 2 + (v + 0.38) ** 2 <= 0.45**2
    point = (v >= -0.3) & (np.abs(u) <= 0.85 * (0.95 - v) / 1.25)
    return lobes | point


def draw_pairs(count: int, seed: int) -> np.ndarray:
    """Numbers (count, 2) of frames of the same kind whose shapes do not overlap, nor touch."""
    rng = np.random.default_rng(seed)
    pairs: list[np.ndarray] = []
    while len(pairs) < count:
        ends = rng.integers(0, SIZES, (2, 5))
        ends[1, 0] = ends[0, 0]
        first, second = render(ends)
        grown = ndimage.binary_dilation(first > 0, np.ones((3, 3)))
        if not (grown & (second > 0)).any():
            pairs.append(index_of(ends))
    return np.stack(pairs)


def shows_one_shape(images: np.ndarray) -> np.ndarray:
    """(N,) bool: whether images (N, 64, 64), levels of any dtype, show exactly one shape of this world."""
    return np.array([_shows_one(image) for image in np.asarray(images, np.float32)])


def _shows_one(image: np.ndarray) -> bool:
    is_patch = image >= THRESHOLD
    _, num_patches = ndimage.label(is_patch, np.ones((3, 3)))
    core = ndimage.binary_erosion(is_patch)
    if num_patches != 1 or not core.any() or image[core].mean() < BRIGHT_LEAST:
        return False
    return best_iou(image >= INSIDE) >= IOU_LEAST


def best_iou(is_inside: np.ndarray) -> float:
    """Largest intersection over union of a patch (64, 64) bool with any shape, size and turn at the patch's place."""
    if not is_inside.any():
        return 0.0
    centred = _centred(is_inside)
    templates = _templates()
    most = 0.0
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = np.roll(centred, (down, right), (0, 1)).reshape(-1)
            both = templates @ moved.astype(np.float32)
            either = templates.sum(1) + moved.sum() - both
            most = max(most, float((both / either).max()))
    return most


@functools.lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """(288, 4096) float32 of 0 and 1: every shape alone, its centre of mass in the middle."""
    stamps = [_stamp(kind, size, turn) for kind, size, turn in np.ndindex(*SIZES[:3])]
    canvases = [np.pad(stamp >= INSIDE, (SIDE - len(stamp)) // 2) for stamp in stamps]
    return np.stack([_centred(canvas).reshape(-1) for canvas in canvases]).astype(np.float32)


def _centred(is_inside: np.ndarray) -> np.ndarray:
    down, right = (SIDE // 2 - round(float(place.mean())) for place in np.nonzero(is_inside))
    return np.roll(is_inside, (down, right), (0, 1))
