"""Pictures of what an encoder has learned: reconstructions, traversals, interpolations, samples.

Shapes: N frames, H height, W width, Z latent dimensions. Pixel values are levels, 0 to 255.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.models.distributions import DEQUANTISATION_MEAN, DiagonalGaussian, kl_divergence
from pipeline.models.latent import LatentModel
from pipeline.plate import Pixels, Row, compose, heat

COLUMNS = 6
NUM_TRAVERSED = 6
NUM_PAIRS = 2
SAMPLE_ROWS = 3
BATCH_SIZE = 64
TRAVERSAL_SIGMAS = (-2.0, -1.0, 0.0, 1.0, 2.0)
MIN_CONTRAST_LEVELS = 8.0
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"


@torch.inference_mode()
def encoder_pictures(model: LatentModel, frames: Pixels, out: Path) -> list[Path]:
    """Draws the four pictures by which a person judges an encoder.

    Args:
        model: On the CPU, trained; its training flag is as before afterwards.
        frames: (N, H, W) uint8, at least 2, better some hundreds that were held out of training.
        out: Folder for the pictures; made when missing.

    Returns:
        The files reconstructions.png, traversals.png, interpolation.png and samples.png, in this order.

    Raises:
        ValueError: Fewer than two frames, or not (N, H, W) uint8.
    """
    if frames.ndim != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(f"encoder_pictures needs at least 2 frames (N, H, W) uint8: got {frames.shape} {frames.dtype}")
    was_training = model.training
    model.eval()
    posterior = _infer(model, frames)
    plates = {
        "reconstructions": _reconstructions(model, frames, posterior),
        "traversals": _traversals(model, posterior),
        "interpolation": _interpolation(model, frames, posterior),
        "samples": _samples(model),
    }
    model.train(was_training)
    out.mkdir(parents=True, exist_ok=True)
    return [_save(rows, out / f"{name}.png") for name, rows in plates.items()]


def _save(rows: list[Row], path: Path) -> Path:
    compose(rows).save(path)
    return path


def _infer(model: LatentModel, frames: Pixels) -> DiagonalGaussian:
    posteriors = [model.infer(batch) for batch in torch.split(torch.from_numpy(frames), BATCH_SIZE)]
    return DiagonalGaussian(torch.cat([q.mean for q in posteriors]), torch.cat([q.logvar for q in posteriors]))


def _decode(model: LatentModel, z: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Decoder mean, as of uint8 pixels, and standard deviation for latents (N, Z): each (N, H, W) float32, levels."""
    parts = [model.decode(batch) for batch in torch.split(z, BATCH_SIZE)]
    mean = torch.cat([part.mean for part in parts]) - DEQUANTISATION_MEAN
    variance = torch.cat([part.variance.expand_as(part.mean) for part in parts])
    return mean.numpy(), variance.sqrt().numpy()


def _as_pixels(levels: NDArray[np.float32]) -> Pixels:
    """Rounds levels to uint8, clipping what lies outside of 0 to 255."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _reconstructions(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian) -> list[Row]:
    chosen = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
    mean, std = _decode(model, posterior.mean[chosen])
    error = np.abs(frames[chosen].astype(np.float32) - mean)
    std_top, error_top = _contrast(std), _contrast(error)
    return [
        Row("Frame", list(frames[chosen])),
        Row("Decoder mean", list(_as_pixels(mean)), note="the frame, seen through its latent"),
        Row("Decoder std", [heat(cell, std_top) for cell in std], note=f"black 0, bright {std_top:.0f} levels or more"),
        Row("Error", [heat(cell, error_top) for cell in error], note=f"black 0, bright {error_top:.0f} levels or more"),
    ]


def _contrast(values: NDArray[np.float32]) -> float:
    """The value to show brightest: the 99.5th percentile, so that one bright pixel does not darken the rest."""
    return max(MIN_CONTRAST_LEVELS, float(np.quantile(values, 0.995)))


def _traversals(model: LatentModel, posterior: DiagonalGaussian) -> list[Row]:
    """Moves one dimension at a time through the range it takes on these frames, from the frame nearest to the mean."""
    kl = kl_divergence(posterior, model.prior()).mean(0)
    typical = (posterior.mean - posterior.mean.mean(0)).square().sum(1).argmin()
    most_active = kl.argsort(descending=True)[:NUM_TRAVERSED].tolist()
    return [_traversal(model, posterior, int(typical), dim, float(kl[dim])) for dim in most_active]


def _traversal(model: LatentModel, posterior: DiagonalGaussian, base: int, dim: int, kl: float) -> Row:
    z = posterior.mean[base].repeat(len(TRAVERSAL_SIGMAS), 1)
    centre, spread = posterior.mean[:, dim].mean(), posterior.mean[:, dim].std()
    z[:, dim] = centre + spread * torch.tensor(TRAVERSAL_SIGMAS)
    mean, _ = _decode(model, z)
    change = mean.max(0) - mean.min(0)
    captions = [f"{sigmas:+.0f}{SIGMA}" if sigmas else "mean" for sigmas in TRAVERSAL_SIGMAS]
    cells = [_grey_to_rgb(cell) for cell in _as_pixels(mean)] + [heat(change, _contrast(change))]
    return Row(f"z{dim}", cells, note=f"KL {kl:.2f} nats", captions=[*captions, "change"])


def _grey_to_rgb(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, axis=-1)


def _interpolation(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian) -> list[Row]:
    return [row for first, last in _pairs(frames) for row in _blend(model, frames, posterior, first, last)]


def _pairs(frames: Pixels) -> list[tuple[int, int]]:
    """Pairs of frames that differ much: each start with the frame least like it, in squared pixel difference."""
    starts = sorted({0, len(frames) // 2})[:NUM_PAIRS]
    flat = frames.reshape(len(frames), -1).astype(np.float32)
    return [(start, int(np.square(flat - flat[start]).mean(1).argmax())) for start in starts]


def _blend(model: LatentModel, frames: Pixels, posterior: DiagonalGaussian, first: int, last: int) -> list[Row]:
    """One way from a frame to another through the latent space, and one through the pixels, COLUMNS steps each."""
    weights = torch.linspace(0, 1, COLUMNS)[:, None]
    through_latents, _ = _decode(model, torch.lerp(posterior.mean[first], posterior.mean[last], weights))
    ends = frames[[first, last]].astype(np.float32)
    steps = weights.numpy()[..., None]
    through_pixels = (1 - steps) * ends[0] + steps * ends[1]
    return [
        Row("Through the latent space", list(_as_pixels(through_latents)), note="decoder mean"),
        Row("Through the pixels", list(_as_pixels(through_pixels)), note="the two frames cross-fade"),
    ]


def _samples(model: LatentModel) -> list[Row]:
    """Decoder means of latents drawn from the prior, always the same draws."""
    prior = model.prior()
    noise = torch.randn(SAMPLE_ROWS * COLUMNS, *prior.mean.shape, generator=torch.Generator().manual_seed(0))
    mean, _ = _decode(model, prior.mean + noise * (0.5 * prior.logvar).exp())
    cells = list(_as_pixels(mean))
    rows = [cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)]
    labels = ["Drawn from the prior"] + [""] * (SAMPLE_ROWS - 1)
    notes = ["decoder mean"] + [""] * (SAMPLE_ROWS - 1)
    return [Row(label, row, note=note) for label, row, note in zip(labels, rows, notes, strict=True)]
