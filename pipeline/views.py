"""What the figures of an encoder are made of: latents moved one by one, what each looks at, the way between two frames.

Where z is a grid, a latent is one channel in one cell: figures are of channels, each moved in the cell in which it
carries most.

Shapes: N frames, H height, W width, Z latent dimensions, V values along a slider, C units. Pixels are levels, 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.models.distributions import DEQUANTISATION_MEAN, DiagonalGaussian, kl_divergence
from pipeline.models.latent import LatentModel
from pipeline.plate import Pixels

NUM_SHOWN = 12
NUM_DIRECTIONS = 6
NUM_LOOKED_AT = 32
NUM_PAIRS = 2
BATCH_SIZE = 64
SIGMAS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
NUM_BLENDS = 11

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Unit:
    """A latent, or a channel of a grid of latents.

    Attributes:
        name: "z17", or "channel 3".
        kl: Of the posterior to the prior, nats a frame; a channel's is summed over its cells.
        num_active: How many of its latents are active; of a flat z one or none.
        num_latents: Of how many.
    """

    name: str
    kl: float
    num_active: int
    num_latents: int = 1


@dataclass(frozen=True)
class View:
    """One way through the latent space, along the range that real frames take there; all other ways stay.

    Attributes:
        name: "z17", "channel 3" or "direction 1".
        note: What it carries, in words.
        values: (V,) coordinates that it is moved to, from -2 to 2 standard deviations around the mean.
        strip: (V, H, W) uint8, the decoder's means.
        looks: (H, W), not negative: what it looks at. Of a channel the KL of each cell, nats. Of anything else how far
            the posterior mean moves when a pixel does what it does in the game: mean absolute gradient times the
            pixel's standard deviation.
    """

    name: str
    note: str
    values: tuple[float, ...]
    strip: Pixels
    looks: Floats

    @property
    def change(self) -> Floats:
        """(H, W) levels, how far each pixel goes on the way."""
        return np.ptp(self.strip.astype(np.float32), axis=0)


@dataclass(frozen=True)
class Blend:
    """From one frame to another, each (V, H, W) uint8: through the latent space, and through the pixels."""

    latents: Pixels
    pixels: Pixels


def units(shape: Sequence[int], kl_Z: Sequence[float], active_Z: Sequence[bool]) -> list[Unit]:
    """The units of a model whose latents lie in `shape`: (Z,), or (channels, height, width)."""
    kl, active = (np.asarray(values).reshape(shape[0], -1) for values in (kl_Z, active_Z))
    kind = "channel " if len(shape) > 1 else "z"
    return [
        Unit(f"{kind}{index}", float(kl[index].sum()), int(active[index].sum()), kl.shape[1])
        for index in range(shape[0])
    ]


@torch.inference_mode()
def posterior_of(model: LatentModel, frames: Pixels) -> DiagonalGaussian:
    """q(z | x), (N, Z), of frames (N, H, W) uint8."""
    posteriors = [model.infer(batch) for batch in torch.split(torch.from_numpy(frames), BATCH_SIZE)]
    return DiagonalGaussian(torch.cat([q.mean for q in posteriors]), torch.cat([q.logvar for q in posteriors]))


@torch.inference_mode()
def decoded(model: LatentModel, z: torch.Tensor) -> tuple[Floats, Floats]:
    """Decoder mean, as of uint8 pixels, and standard deviation for latents (N, Z): each (N, H, W), levels."""
    parts = [model.decode(batch) for batch in torch.split(z, BATCH_SIZE)]
    mean = torch.cat([part.mean for part in parts]) - DEQUANTISATION_MEAN
    variance = torch.cat([part.variance.expand_as(part.mean) for part in parts])
    return mean.numpy(), variance.sqrt().numpy()


def as_pixels(levels: Floats) -> Pixels:
    """Rounds levels to uint8, clipping what lies outside of 0 to 255."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def latent_views(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian) -> list[View]:
    """The units of greatest KL, the greatest first, each seen from one and the same eventful frame.

    Args:
        model: In eval mode; its encoder must take float levels too, since gradients are taken to pixels.
        frames: (N, H, W) uint8.
        posterior: Of these frames.
    """
    shape = model.config.latent_shape
    kl_CM = kl_divergence(posterior, model.prior()).mean(0).view(shape[0], -1)
    shown = kl_CM.sum(1).argsort(descending=True)[:NUM_SHOWN].tolist()
    cells = [int(kl_CM[unit].argmax()) for unit in shown]
    ways = torch.zeros(len(shown), kl_CM.numel())
    ways[range(len(shown)), [unit * kl_CM.shape[1] + cell for unit, cell in zip(shown, cells)]] = 1
    all_units = units(shape, kl_CM.flatten().tolist(), [True] * kl_CM.numel())
    notes = [f"KL {all_units[unit].kl:.2f} nats" for unit in shown]
    if len(shape) > 1:
        side, size = model.config.cell_pixels, frames.shape[1:]
        looks = [_spread(kl_CM[unit].view(*shape[1:]).numpy(), side, size) for unit in shown]
        places = [divmod(cell, shape[2]) for cell in cells]
        notes = [f"{note}; moved in row {row}, column {column}" for note, (row, column) in zip(notes, places)]
    else:
        looks = _sensitivity(model, frames, ways)
    names = [all_units[unit].name for unit in shown]
    return _along(model, posterior, ways, names, notes, looks)


def _eventful(model: LatentModel, posterior: DiagonalGaussian) -> list[int]:
    """The frames by how much their latents tell, the median first, the most telling last: of those that show much."""
    kl_N = kl_divergence(posterior, model.prior()).sum(1)
    return kl_N.argsort().tolist()[len(kl_N) // 2 :]


def direction_views(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian) -> list[View]:
    """The directions in which posterior means vary most, their principal components: many latents at once.

    Where a code is spread over many latents, moving a single one shows little. Arguments as above.
    """
    deviation = posterior.mean - posterior.mean.mean(0)
    _, spread, ways = torch.linalg.svd(deviation, full_matrices=False)
    share, ways = spread.square() / spread.square().sum().clamp(min=1e-30), ways[:NUM_DIRECTIONS]
    names = [f"direction {number + 1}" for number in range(len(ways))]
    notes = [f"{part:.1%} of the variance" for part in share[: len(ways)].tolist()]
    return _along(model, posterior, ways, names, notes, _sensitivity(model, frames, ways))


def _along(
    model: LatentModel,
    posterior: DiagonalGaussian,
    ways: torch.Tensor,
    names: Sequence[str],
    notes: Sequence[str],
    looks: Sequence[Floats],
) -> list[View]:
    """Views along unit vectors (K, Z)."""
    frames = _eventful(model, posterior)
    base, found = frames[int(0.8 * len(frames))], []
    for way, name, note, look in zip(ways, names, notes, looks):
        along = posterior.mean @ way
        values = along.mean() + along.std() * torch.tensor(SIGMAS)
        z = posterior.mean[base] + (values - along[base])[:, None] * way
        found.append(View(name, note, tuple(values.tolist()), as_pixels(decoded(model, z)[0]), look))
    return found


def _sensitivity(model: LatentModel, frames: Pixels, ways: torch.Tensor) -> list[Floats]:
    """For each vector (K, Z) an (H, W): mean over frames of |d (posterior mean along it) / d pixel|, times the pixel's
    standard deviation."""
    chosen = np.linspace(0, len(frames) - 1, min(NUM_LOOKED_AT, len(frames))).round().astype(int)
    levels = torch.from_numpy(frames[chosen]).float().requires_grad_()
    with torch.enable_grad():
        totals = (model.infer(levels).mean @ ways.T).sum(0).unbind()
    gradients = [torch.autograd.grad(total, levels, retain_graph=True)[0].abs().mean(0).numpy() for total in totals]
    deviation = frames.std(0, dtype=np.float32)
    return [gradient * deviation for gradient in gradients]


def _spread(cells: Floats, side: int, size: tuple[int, ...]) -> Floats:
    """Values of cells (h, w) over the pixels (H, W) that they cover; a grid may reach beyond the frame."""
    return cells.repeat(side, 0).repeat(side, 1)[: size[0], : size[1]]


def blends(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian) -> list[Blend]:
    """Ways between pairs of eventful frames: each start with the frame least like it, by squared pixel difference."""
    left = sorted(_eventful(model, posterior))
    starts, ends = sorted({left[0], left[len(left) // 2]})[:NUM_PAIRS], list[int]()
    for start in starts:
        others = [index for index in left if index not in ends] or left
        apart = np.square(frames[others].astype(np.float32) - frames[start]).mean((1, 2))
        ends.append(others[int(apart.argmax())])
    weights = torch.linspace(0, 1, NUM_BLENDS)[:, None]
    found = []
    for first, last in zip(starts, ends):
        mean, _ = decoded(model, torch.lerp(posterior.mean[first], posterior.mean[last], weights))
        share = weights.numpy()[..., None]
        pixels = (1 - share) * frames[first].astype(np.float32) + share * frames[last].astype(np.float32)
        found.append(Blend(as_pixels(mean), as_pixels(pixels)))
    return found


def samples(model: LatentModel, count: int) -> Pixels:
    """Decoder means (count, H, W) of latents drawn from the prior, always the same draws."""
    prior = model.prior()
    noise = torch.randn(count, *prior.mean.shape, generator=torch.Generator().manual_seed(0))
    return as_pixels(decoded(model, prior.mean + noise * (0.5 * prior.logvar).exp())[0])
